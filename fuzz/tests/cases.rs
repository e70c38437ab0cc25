//! Every stored input fulfils the property of its target.

use std::fs;
use std::path::{Path, PathBuf};

use tower_idempotency_fuzz::PROPERTIES;

#[test]
fn every_seed_and_every_found_case_fulfils_its_property() {
    for (name, property) in PROPERTIES {
        let seeds = files("seeds", name);
        assert!(!seeds.is_empty(), "{name} has no seeds");
        for file in seeds.iter().chain(&files("found", name)) {
            println!("{}", file.display());
            property(&fs::read(file).unwrap());
        }
    }
}

#[test]
fn each_property_has_a_program_that_searches() {
    let programs = fs::read_dir(root().join("fuzz_targets")).unwrap();
    let mut programs: Vec<_> = programs.map(|file| file.unwrap().path()).collect();
    programs.sort();
    let expected = PROPERTIES.map(|(name, _)| root().join(format!("fuzz_targets/{name}.rs")));
    assert_eq!(programs, expected);
}

fn files(folder: &str, name: &str) -> Vec<PathBuf> {
    let Ok(files) = fs::read_dir(root().join(folder).join(name)) else {
        return Vec::new();
    };
    files.map(|file| file.unwrap().path()).collect()
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}
