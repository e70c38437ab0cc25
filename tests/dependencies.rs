//! What the crate pulls in: licences that a product may ship with, and a minimum Rust that holds.

use std::process::Command;

use serde_json::Value;

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

/// Every package that a user of the crate compiles with these features; no development dependencies.
fn shipped(features: &str) -> Vec<Value> {
    let run = |arguments: &[&str]| {
        let manifest = concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml");
        let cargo = Command::new(env!("CARGO"))
            .args(arguments)
            .args(["--manifest-path", manifest])
            .output()
            .unwrap();
        assert!(cargo.status.success(), "{}", String::from_utf8_lossy(&cargo.stderr));
        String::from_utf8(cargo.stdout).unwrap()
    };
    let tree = run(&[
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
    let metadata: Value = serde_json::from_str(&run(&["metadata", "--format-version", "1", "--all-features"])).unwrap();
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

/// Whether an SPDX expression can be satisfied from the list: one part of every conjunction.
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

#[test]
fn every_dependency_has_a_licence_that_products_may_ship_with() {
    let shipped =
        shipped("axum,follow-redirect,metrics,once,postgres-rustls,redis-rustls,reqwest,retry,tonic,webhooks");
    assert!(shipped.len() > 20, "{}", shipped.len());
    for package in shipped {
        let licence = package["license"].as_str().unwrap_or("none");
        assert!(is_allowed(licence), "{} has the licence {licence}", package["name"]);
    }
}

#[test]
fn no_dependency_asks_for_a_newer_rust_than_its_feature_declares() {
    let ours = env!("CARGO_PKG_RUST_VERSION");
    let declared = [
        ("", ours),
        ("axum", ours),
        ("conformance", ours),
        ("follow-redirect", ours),
        ("metrics", ours),
        ("once", ours),
        ("reqwest", ours),
        ("retry", ours),
        ("tonic", "1.87"),
        ("webhooks", ours),
        ("redis", "1.88"),
        ("redis-rustls", "1.88"),
        ("postgres", "1.94"),
        ("postgres-rustls", "1.94"),
    ];
    let manifest = include_str!("../Cargo.toml");
    for (feature, minimum) in declared {
        assert!(
            minimum == ours || manifest.contains(&format!("Needs Rust {minimum}")),
            "{feature}"
        );
        for package in shipped(feature) {
            if let Some(theirs) = package["rust_version"].as_str() {
                assert!(
                    version(theirs) <= version(minimum),
                    "{feature}: {} asks for Rust {theirs}",
                    package["name"]
                );
            }
        }
    }
}
