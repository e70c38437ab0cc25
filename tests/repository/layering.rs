//! A module imports only from floors below its own. ARCHITECTURE.md lists the eight floors.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

const FLOORS: [&[&str]; 8] = [
    &["sync"],
    &["error", "clock", "sharded", "detach", "catch_panic", "callback"],
    &["protocol", "telemetry"],
    &["http", "store"],
    &["engine"],
    &["client", "outbox", "receiver", "server"],
    &["testing"],
    &["guide", "lib"],
];

fn floor_of(module: &str) -> usize {
    let floor = FLOORS.iter().position(|floor| floor.contains(&module));
    floor.unwrap_or_else(|| {
        panic!("module {module} has no floor: add it to tests/repository/layering.rs and ARCHITECTURE.md")
    }) + 1
}

fn sources(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let nested = entries.map(|path| if path.is_dir() { sources(&path) } else { vec![path] });
    nested
        .flatten()
        .filter(|path| path.extension().is_some_and(|extension| extension == "rs"))
        .collect()
}

/// Returns the module on the first level below `src` that a file belongs to.
fn module_of(file: &Path, src: &Path) -> String {
    let relative = file.strip_prefix(src).unwrap();
    relative
        .components()
        .next()
        .unwrap()
        .as_os_str()
        .to_str()
        .unwrap()
        .trim_end_matches(".rs")
        .to_owned()
}

/// Returns the modules that a file names after `crate::`, outside of comments.
fn imports(source: &str) -> Vec<String> {
    let code = source.lines().filter(|line| !line.trim_start().starts_with("//"));
    // A path in quotes is a link in the docs.
    let paths = code.flat_map(|line| line.match_indices("crate::").map(move |(at, _)| line.split_at(at)));
    let paths = paths.filter(|(before, _)| !before.ends_with('"'));
    let paths = paths.map(|(_, path)| &path["crate::".len()..]);
    let names = paths.map(|path| {
        path.chars()
            .take_while(|c| c.is_alphanumeric() || *c == '_')
            .collect::<String>()
    });
    // A name that begins with a capital is re-exported by `lib`. An empty name stands for a list
    // and would hide the imports.
    names.collect()
}

#[test]
fn a_module_imports_only_from_floors_below_it() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut checked = 0;
    for file in sources(&src) {
        let module = module_of(&file, &src);
        let source = fs::read_to_string(&file).unwrap();
        let tests = source.find("#[cfg(test)]").unwrap_or(source.len());
        for import in imports(&source[..tests]) {
            let shown = file.display();
            assert!(
                !import.is_empty(),
                "{shown}: import from one module at a time, not `crate::{{..}}`"
            );
            assert!(
                import.starts_with(char::is_lowercase),
                "{shown}: `crate::{import}` goes through lib; import it from its module"
            );
            let below = floor_of(&import) < floor_of(&module);
            assert!(
                import == module || below,
                "{shown}: {module} imports from {import}, which is not below it"
            );
            checked += 1;
        }
    }
    assert!(
        checked > 50,
        "only {checked} imports were found: does the test still read the sources?"
    );
}

#[test]
fn architecture_names_only_files_and_functions_that_exist() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let src = root.join("src");
    let files = sources(&src);
    let code: String = files.iter().map(|file| fs::read_to_string(file).unwrap()).collect();
    let page = fs::read_to_string(root.join("ARCHITECTURE.md")).unwrap();
    let is_name = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || "_/.".contains(c);
    let mut checked = 0;
    for name in page.split('`').skip(1).step_by(2) {
        if name.is_empty() || !name.chars().all(is_name) {
            continue;
        }
        let is_module = |file: &PathBuf| {
            let path = file.strip_prefix(&src).unwrap().with_extension("");
            path.iter().any(|part| part == name.trim_end_matches('/'))
        };
        let exists = root.join(name).exists() || src.join(name).exists() || files.iter().any(is_module);
        let is_function = [format!("fn {name}("), format!("fn {name}<")]
            .iter()
            .any(|start| code.contains(start));
        assert!(
            exists || is_function,
            "ARCHITECTURE.md names `{name}`, which is not in `src`"
        );
        checked += 1;
    }
    assert!(checked > 50, "only {checked} names were found");
}

#[test]
fn the_protocol_is_pure() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    for file in sources(&src.join("protocol")) {
        let source = fs::read_to_string(&file).unwrap();
        let code = &source[..source.find("#[cfg(test)]").unwrap_or(source.len())];
        for foreign in [
            "tokio",
            "http::",
            "async ",
            "std::io",
            "std::net",
            "std::fs",
            "Instant",
            "SystemTime",
            "Mutex",
        ] {
            assert!(
                !code.contains(foreign),
                "{}: the protocol must not use {foreign}",
                file.display()
            );
        }
    }
}

#[test]
fn only_telemetry_and_the_clock_use_the_feature_metrics() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    for file in sources(&src) {
        let source = fs::read_to_string(&file).unwrap();
        let metrics = source.contains("feature = \"metrics\"");
        let allowed = ["telemetry.rs", "clock.rs"].iter().any(|name| file.ends_with(name));
        assert!(
            !metrics || allowed,
            "{}: the feature `metrics` belongs to telemetry",
            file.display()
        );
    }
}

/// tokio's timers panic in a runtime without timers. `clock` has timers for every runtime.
#[test]
fn only_the_clock_makes_timers() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    // The driver of PostgreSQL needs the timers of the runtime, and only tests use the conformance
    // suite.
    let excepted = |file: &Path| {
        file.ends_with("clock.rs")
            || file.ends_with("postgres/watch.rs")
            || file.to_string_lossy().contains("/conformance/")
    };
    for file in sources(&src).iter().filter(|file| !excepted(file)) {
        let source = fs::read_to_string(file).unwrap();
        // Unit tests run on runtimes of their own.
        let code = source.split("#[cfg(test)]\nmod tests").next().unwrap_or_default();
        let timers = code.matches("tokio::time::").count();
        assert_eq!(timers, 0, "{}: take timers from `crate::clock`", file.display());
    }
}

/// `catch_panic` decides for all callers how a panic is caught and what remains of it.
#[test]
fn panics_are_caught_in_one_place() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    // `clock` is on the floor of `catch_panic` and cannot import it.
    let excepted = ["catch_panic.rs", "clock.rs"];
    for file in sources(&src) {
        if excepted.iter().any(|name| file.ends_with(name)) {
            continue;
        }
        let source = fs::read_to_string(&file).unwrap();
        let code = source.split("#[cfg(test)]\nmod tests").next().unwrap_or_default();
        let shown = file.display();
        assert!(!code.contains("catch_unwind"), "{shown}: use `crate::catch_panic`");
    }
}

/// Returns the files of a folder, and its subfolders as one unit each, with the units of the folder
/// that they import.
fn imports_within(folder: &Path, src: &Path) -> BTreeMap<String, BTreeSet<String>> {
    let name = |path: &Path| path.file_stem().unwrap().to_str().unwrap().to_owned();
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let units: Vec<PathBuf> = entries
        .filter(|path| !["mod", "lib"].contains(&name(path).as_str()))
        .filter(|path| path.is_dir() || path.extension().is_some_and(|extension| extension == "rs"))
        .collect();
    let names: BTreeSet<String> = units.iter().map(|unit| name(unit)).collect();
    let absolute = folder
        .strip_prefix(src)
        .unwrap()
        .components()
        .fold("crate::".to_owned(), |path, folder| {
            format!("{path}{}::", folder.as_os_str().to_str().unwrap())
        });
    let mut edges: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for unit in &units {
        let files = if unit.is_dir() {
            sources(unit)
        } else {
            vec![unit.clone()]
        };
        for file in files {
            let source = fs::read_to_string(&file).unwrap();
            let code = source.split("#[cfg(test)]\nmod tests").next().unwrap_or_default();
            let code = code.lines().filter(|line| !line.trim_start().starts_with("//"));
            let depth = file.strip_prefix(folder).unwrap().components().count() - usize::from(name(&file) == "mod");
            let relative = "super::".repeat(depth);
            for line in code {
                let paths = line
                    .match_indices(&relative)
                    .filter(|(at, _)| !line[..*at].ends_with("super::"));
                let paths = paths.map(|(at, _)| &line[at + relative.len()..]);
                let paths = paths.chain(line.split(absolute.as_str()).skip(1));
                for path in paths {
                    let import: String = path.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
                    if names.contains(&import) && import != name(unit) {
                        edges.entry(name(unit)).or_default().insert(import);
                    }
                }
            }
        }
    }
    edges
}

/// Returns a circle that begins at the last unit of `path`, if there is one.
fn circle(edges: &BTreeMap<String, BTreeSet<String>>, path: &mut Vec<String>) -> Option<Vec<String>> {
    let imports = edges.get(path.last()?)?;
    for import in imports {
        if let Some(begin) = path.iter().position(|unit| unit == import) {
            return Some(path[begin..].to_vec());
        }
        path.push(import.clone());
        if let Some(circle) = circle(edges, path) {
            return Some(circle);
        }
        path.pop();
    }
    None
}

fn folders(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let nested = entries.filter(|path| path.is_dir()).flat_map(|path| folders(&path));
    std::iter::once(folder.to_owned()).chain(nested).collect()
}

#[test]
fn files_of_a_folder_do_not_import_each_other_in_a_circle() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut imports = 0;
    for folder in folders(&src).iter().filter(|folder| **folder != src) {
        let edges = imports_within(folder, &src);
        imports += edges.values().map(BTreeSet::len).sum::<usize>();
        for unit in edges.keys() {
            let circle = circle(&edges, &mut vec![unit.clone()]);
            assert_eq!(circle, None, "{}", folder.display());
        }
    }
    assert!(
        imports > 100,
        "only {imports} imports were found: does the test still read the sources?"
    );
}
