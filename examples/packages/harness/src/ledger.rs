//! Ledgers: files in which several processes record their effects.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// A file to which several processes append whole lines. Clones write to the same file.
#[derive(Clone, Debug)]
pub struct Ledger {
    path: PathBuf,
    file: Arc<File>,
}

impl Ledger {
    /// Opens the ledger at this path, and creates it if it does not exist.
    ///
    /// # Panics
    ///
    /// Panics if the file cannot be opened.
    pub fn open(path: &Path) -> Self {
        let file = OpenOptions::new().append(true).create(true).open(path);
        let file = file.unwrap_or_else(|error| panic!("cannot open {}: {error}", path.display()));
        Self {
            path: path.to_owned(),
            file: Arc::new(file),
        }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Appends a line. The line is on the disk when this returns.
    ///
    /// # Panics
    ///
    /// Panics if the line cannot be written.
    pub fn append_synced(&self, line: &str) {
        self.append(line);
        self.file.sync_data().unwrap();
    }

    /// Appends a line. The line survives a crash of this process, but not of the machine. It is one
    /// write, so that lines of other processes come before or after it, never in the middle.
    ///
    /// # Panics
    ///
    /// Panics if the line cannot be written.
    pub fn append(&self, line: impl fmt::Display) {
        let line = format!("{line}\n");
        (&*self.file).write_all(line.as_bytes()).unwrap();
    }

    /// Returns all lines of all processes.
    ///
    /// # Panics
    ///
    /// Panics if the file cannot be read.
    pub fn lines(&self) -> Vec<String> {
        let text = std::fs::read_to_string(&self.path).unwrap();
        text.lines().map(str::to_owned).collect()
    }

    /// Returns the number of lines for each first word.
    ///
    /// # Panics
    ///
    /// Panics if the file cannot be read.
    pub fn counts(&self) -> BTreeMap<String, usize> {
        let lines = self.lines();
        tally(lines.iter().map(|line| line.split(' ').next().unwrap_or_default()))
    }

    /// Returns the number of lines with this first word.
    ///
    /// # Panics
    ///
    /// Panics if the file cannot be read.
    pub fn count(&self, word: &str) -> usize {
        self.counts().get(word).copied().unwrap_or(0)
    }

    /// Returns the number of occurrences of each line.
    ///
    /// # Panics
    ///
    /// Panics if the file cannot be read.
    pub fn tally(&self) -> BTreeMap<String, usize> {
        tally(self.lines().iter().map(String::as_str))
    }
}

fn tally<'w>(words: impl Iterator<Item = &'w str>) -> BTreeMap<String, usize> {
    let mut tally = BTreeMap::new();
    for word in words {
        *tally.entry(word.to_owned()).or_default() += 1;
    }
    tally
}
