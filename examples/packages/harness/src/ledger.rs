//! Where effects are counted.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

/// A file to which several processes append lines, each of them whole. Clones write to the same file.
#[derive(Clone, Debug)]
pub struct Ledger {
    path: PathBuf,
    file: Arc<Mutex<File>>,
}

impl Ledger {
    /// # Panics
    ///
    /// If it cannot be opened.
    pub fn open(path: &Path) -> Self {
        let file = OpenOptions::new().append(true).create(true).open(path).unwrap();
        Self {
            path: path.to_owned(),
            file: Arc::new(Mutex::new(file)),
        }
    }

    /// Enters an effect: it is on the disk when this returns.
    ///
    /// # Panics
    ///
    /// If it cannot be written.
    pub fn enter(&self, line: &str) {
        self.note(line);
        self.file.lock().unwrap().sync_data().unwrap();
    }

    /// Writes a line, which outlives this process, if not the machine.
    ///
    /// # Panics
    ///
    /// If it cannot be written.
    pub fn note(&self, line: &str) {
        let mut file = self.file.lock().unwrap();
        file.write_all(format!("{line}\n").as_bytes()).unwrap();
    }

    /// All lines, of all processes.
    ///
    /// # Panics
    ///
    /// If it cannot be read.
    pub fn lines(&self) -> Vec<String> {
        let text = std::fs::read_to_string(&self.path).unwrap();
        text.lines().map(str::to_owned).collect()
    }

    /// How many lines there are for each first word; one that a kill cut short counts, too.
    ///
    /// # Panics
    ///
    /// If it cannot be read.
    pub fn counts(&self) -> BTreeMap<String, usize> {
        let mut counts = BTreeMap::new();
        for line in self.lines() {
            let word = line.split(' ').next().unwrap_or_default();
            *counts.entry(word.to_owned()).or_default() += 1;
        }
        counts
    }
}
