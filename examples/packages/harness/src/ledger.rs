//! Where it is written what happened.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// A file to which several processes append lines, each of them whole. Clones write to the same file.
#[derive(Clone, Debug)]
pub struct Ledger {
    path: PathBuf,
    file: Arc<File>,
}

impl Ledger {
    /// # Panics
    ///
    /// If it cannot be opened.
    pub fn open(path: &Path) -> Self {
        let file = OpenOptions::new().append(true).create(true).open(path);
        let file = file.unwrap_or_else(|error| panic!("{} cannot be opened: {error}", path.display()));
        Self {
            path: path.to_owned(),
            file: Arc::new(file),
        }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Enters an effect: it is on the disk when this returns.
    ///
    /// # Panics
    ///
    /// If it cannot be written.
    pub fn enter(&self, line: &str) {
        self.note(line);
        self.file.sync_data().unwrap();
    }

    /// Writes a line, which outlives this process, if not the machine. One write: another's line is before or after it, never within.
    ///
    /// # Panics
    ///
    /// If it cannot be written.
    pub fn note(&self, line: impl fmt::Display) {
        let line = format!("{line}\n");
        (&*self.file).write_all(line.as_bytes()).unwrap();
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

    /// How many lines there are for each first word.
    ///
    /// # Panics
    ///
    /// If it cannot be read.
    pub fn counts(&self) -> BTreeMap<String, usize> {
        let lines = self.lines();
        tally(lines.iter().map(|line| line.split(' ').next().unwrap_or_default()))
    }

    /// How many lines begin with a word.
    ///
    /// # Panics
    ///
    /// If it cannot be read.
    pub fn count(&self, word: &str) -> usize {
        self.counts().get(word).copied().unwrap_or(0)
    }

    /// How often each line stands in it.
    ///
    /// # Panics
    ///
    /// If it cannot be read.
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
