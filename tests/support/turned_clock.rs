//! A wall clock of a server that a test can change.

use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};

/// The offset of the wall clock of the servers that are started with
/// [`environment`](Self::environment).
pub(crate) struct TurnedClock {
    folder: PathBuf,
    offset: std::fs::File,
}

impl TurnedClock {
    pub(crate) fn new() -> Self {
        static COUNT: AtomicUsize = AtomicUsize::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let folder = std::env::temp_dir().join(format!("idempotency-clock-{}-{count}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/support/clock_shim.c");
        let compiled = Command::new("cc")
            .args(["-O2", "-shared", "-fPIC", "-o"])
            .args([&folder.join("shim.so"), &source])
            .status();
        assert!(compiled.expect("these tests need a C compiler, `cc`").success());
        let offset = folder.join("offset");
        std::fs::write(&offset, 0_i64.to_ne_bytes()).unwrap();
        // The server may run as another user.
        for path in [&folder, &folder.join("shim.so"), &offset] {
            std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755)).unwrap();
        }
        let offset = std::fs::File::options().write(true).open(offset).unwrap();
        Self { folder, offset }
    }

    /// Returns the environment variables that the process of the server needs.
    pub(crate) fn environment(&self) -> Vec<(&'static str, PathBuf)> {
        vec![
            ("LD_PRELOAD", self.folder.join("shim.so")),
            ("CLOCK_SHIM", self.folder.join("offset")),
        ]
    }

    /// Sets the clock this number of seconds ahead of the true time, or behind it if negative.
    pub(crate) fn set(&self, seconds: i64) {
        self.offset.write_all_at(&seconds.to_ne_bytes(), 0).unwrap();
    }
}

impl Drop for TurnedClock {
    fn drop(&mut self) {
        drop(std::fs::remove_dir_all(&self.folder));
    }
}
