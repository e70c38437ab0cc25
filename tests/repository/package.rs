//! The package: licences of dependencies that products may ship with, a minimum Rust version that
//! is right, and the published files.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::process::Command;

use serde_json::Value;

const ROOT: &str = env!("CARGO_MANIFEST_DIR");
const MANIFEST: &str = include_str!("../../Cargo.toml");

const LICENCES: [&str; 11] = [
    "MIT",
    "Apache-2.0",
    "Apache-2.0 WITH LLVM-exception",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "BSL-1.0",
    "CC0-1.0",
    "ISC",
    "MIT-0",
    "Unicode-3.0",
    "Zlib",
];

#[test]
fn every_dependency_has_a_licence_that_products_may_ship_with() {
    let features: Vec<_> = minimum_rust_of_features().into_keys().collect();
    let shipped = shipped(&features.join(","));
    assert!(shipped.len() > 20, "{}", shipped.len());
    for package in shipped {
        let licence = package["license"].as_str().unwrap_or("none");
        assert!(is_allowed(licence), "{} has the licence {licence}", package["name"]);
    }
}

/// Compilers since Rust 1.88 accept `let` chains in this edition, and the minimum is older. Parsed as
/// the edition before, a `let` chain is an error.
#[test]
fn no_source_has_a_let_chain() {
    let mut rustfmt = Command::new("rustfmt");
    rustfmt.args(["--check", "--edition", "2021", "--config", "style_edition=2024"]);
    let checked = rustfmt.arg(Path::new(ROOT).join("src/lib.rs")).output().unwrap();
    assert!(checked.status.success(), "{}", String::from_utf8_lossy(&checked.stderr));
}

/// `cargo deny` needs the network, so a release runs it, and these tests check the same list on
/// every change.
#[test]
fn deny_toml_allows_the_same_licences() {
    let configuration = include_str!("../../deny.toml");
    let licences = configuration.split("[licenses]").nth(1).unwrap();
    let list = licences.split_once("allow = [").unwrap().1.split_once(']').unwrap().0;
    let allowed: BTreeSet<&str> = list.split('"').skip(1).step_by(2).collect();
    assert_eq!(allowed, BTreeSet::from(LICENCES));
}

#[test]
fn no_dependency_asks_for_a_newer_rust_than_its_feature_declares() {
    for (feature, minimum) in minimum_rust_of_features() {
        for package in shipped(&feature) {
            if let Some(theirs) = package["rust_version"].as_str() {
                assert!(
                    version(theirs) <= version(&minimum),
                    "{feature}: {} asks for Rust {theirs}. Write `Needs Rust {theirs}.` in the comment above the feature.",
                    package["name"]
                );
            }
        }
    }
}

#[test]
fn the_package_has_every_file_that_a_build_of_it_reads() {
    let files = published();
    for required in [
        "CHANGELOG.md",
        "Cargo.lock",
        "Cargo.toml",
        "LICENSE-APACHE",
        "LICENSE-MIT",
        "README.md",
    ] {
        assert!(files.contains(required), "{required} is not in the package");
    }
    for target in this_package()["targets"].as_array().unwrap() {
        let source = Path::new(target["src_path"].as_str().unwrap())
            .strip_prefix(ROOT)
            .unwrap();
        let source = source.to_str().unwrap();
        assert!(
            files.contains(source) || source.starts_with(TESTS_OF_THE_REPOSITORY),
            "{source} is a target and not in the package"
        );
    }
    let mut included = 0;
    for file in files.iter().filter(|file| file.ends_with(".rs")) {
        let source = fs::read_to_string(Path::new(ROOT).join(file)).unwrap();
        for path in included_by(file, &source) {
            assert!(
                files.contains(&path),
                "{file} includes {path}, which is not in the package"
            );
            included += 1;
        }
    }
    assert!(
        included > 10,
        "only {included} included files were found: does the test still read the sources?"
    );
}

#[test]
fn the_package_has_nothing_that_only_the_repository_needs() {
    const FOLDERS: [&str; 5] = ["benches", "docs", "examples", "src", "tests"];
    const LARGEST: u64 = 100 << 10;
    for file in published() {
        let is_known = match file.split_once('/') {
            Some((folder, _)) => FOLDERS.contains(&folder) && !file.starts_with("examples/packages/"),
            // Cargo itself adds the last four.
            None => [
                "ARCHITECTURE.md",
                "CHANGELOG.md",
                "LICENSE-APACHE",
                "LICENSE-MIT",
                "README.md",
                ".cargo_vcs_info.json",
                "Cargo.lock",
                "Cargo.toml",
                "Cargo.toml.orig",
            ]
            .contains(&file.as_str()),
        };
        assert!(is_known, "{file} is in the package: see `include` in Cargo.toml");
        assert!(!file.starts_with(TESTS_OF_THE_REPOSITORY), "{file} is in the package");
        let bytes = fs::metadata(Path::new(ROOT).join(&file)).map_or(0, |metadata| metadata.len());
        assert!(bytes <= LARGEST, "{file} has {bytes} bytes, which every user downloads");
    }
}

#[test]
fn the_tour_of_the_examples_names_each_of_them() {
    let tour = include_str!("../../examples/README.md");
    let package = this_package();
    let examples = package["targets"].as_array().unwrap().iter();
    let examples = examples.filter(|target| target["kind"] == serde_json::json!(["example"]));
    let examples = examples.map(|target| target["name"].as_str().unwrap().to_owned());
    let folders = fs::read_dir(Path::new(ROOT).join("examples/packages")).unwrap();
    let packages = folders
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.join("src/main.rs").is_file());
    let packages = packages.map(|path| path.file_name().unwrap().to_str().unwrap().to_owned());
    let words: BTreeSet<&str> = tour
        .split(|c: char| !(c.is_alphanumeric() || c == '_' || c == '-'))
        .collect();
    for name in examples.chain(packages) {
        assert!(words.contains(name.as_str()), "examples/README.md does not name {name}");
    }
}

/// Tests that read unpublished files.
const TESTS_OF_THE_REPOSITORY: &str = "tests/repository/";

/// Returns each feature of the manifest with the minimum Rust version that its comment declares.
/// The empty name stands for the crate without features.
fn minimum_rust_of_features() -> BTreeMap<String, String> {
    let ours = env!("CARGO_PKG_RUST_VERSION");
    let package = this_package();
    let features = package["features"].as_object().unwrap().keys();
    let minimum_of = |feature: &String| {
        let above = MANIFEST.split_once(&format!("\n{feature} = ")).unwrap().0;
        let comment: Vec<_> = above.lines().rev().take_while(|line| line.starts_with('#')).collect();
        let declared = comment.iter().find_map(|line| line.split_once("Needs Rust "));
        declared
            .map_or(ours, |(_, version)| {
                version.split(". ").next().unwrap().trim_end_matches('.')
            })
            .to_owned()
    };
    let declared = features.map(|feature| (feature.clone(), minimum_of(feature)));
    declared.chain([(String::new(), ours.to_owned())]).collect()
}

/// Returns every package that a user of the crate compiles with these features, without development
/// dependencies.
fn shipped(features: &str) -> Vec<Value> {
    let tree = cargo(&[
        "tree",
        "--edges",
        "normal,build",
        "--features",
        features,
        "--prefix",
        "none",
        "--format",
        "{p}",
        "--target",
        "all",
    ]);
    let metadata: Value =
        serde_json::from_str(&cargo(&["metadata", "--format-version", "1", "--all-features"])).unwrap();
    let named = |package: &&Value| {
        let name = format!(
            "{} v{}",
            package["name"].as_str().unwrap(),
            package["version"].as_str().unwrap()
        );
        tree.lines()
            .any(|line| line == name || line.starts_with(&format!("{name} ")))
    };
    metadata["packages"]
        .as_array()
        .unwrap()
        .iter()
        .filter(named)
        .cloned()
        .collect()
}

/// Returns the manifest as cargo reads it.
fn this_package() -> Value {
    let metadata: Value = serde_json::from_str(&cargo(&["metadata", "--format-version", "1", "--no-deps"])).unwrap();
    metadata["packages"][0].clone()
}

/// Returns the paths of the files that `cargo publish` would upload.
fn published() -> BTreeSet<String> {
    let list = cargo(&["package", "--list", "--allow-dirty", "--offline"]);
    list.lines().map(|file| file.replace('\\', "/")).collect()
}

/// Returns the files that a source names in `include_str!` and `include_bytes!`, by their paths
/// within the package.
fn included_by(file: &str, source: &str) -> Vec<String> {
    let literals = ["include_str!(\"", "include_bytes!(\""]
        .into_iter()
        .flat_map(|name| source.split(name).skip(1));
    let named = literals.map(|rest| rest.split_once('"').unwrap().0);
    named
        .map(|name| {
            let mut path: Vec<&str> = file.split('/').collect();
            path.pop();
            for part in name.split('/') {
                match part {
                    ".." => drop(path.pop()),
                    part => path.push(part),
                }
            }
            path.join("/")
        })
        .collect()
}

fn cargo(arguments: &[&str]) -> String {
    let output = Command::new(env!("CARGO"))
        .args(arguments)
        .args(["--manifest-path", &format!("{ROOT}/Cargo.toml")])
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// Whether the licences of the list satisfy an SPDX expression: one part of every conjunction.
fn is_allowed(expression: &str) -> bool {
    let plain = expression.replace(['(', ')'], "").replace('/', " OR ");
    plain
        .split(" AND ")
        .all(|part| part.split(" OR ").any(|licence| LICENCES.contains(&licence.trim())))
}

fn version(text: &str) -> (u32, u32) {
    let mut parts = text.split('.').map(|part| part.parse().unwrap());
    (parts.next().unwrap(), parts.next().unwrap_or(0))
}
