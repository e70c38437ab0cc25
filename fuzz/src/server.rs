//! A server on a Unix socket that replies as a property has chosen, and the time of its clients.

use std::path::{Path, PathBuf};
use std::sync::Once;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::net::{UnixListener, UnixStream};
use tokio::runtime::Builder;
use tower_idempotency::{Error, ErrorKind};

/// Longer than all time limits of a store together. An operation that takes longer hangs. The time
/// is virtual: it moves on as soon as neither side has anything to do.
const HANGING: Duration = Duration::from_secs(120);

/// Longer than a driver tries to connect again.
const GIVEN_UP: Duration = Duration::from_secs(20);

/// Runs a client of a server at a socket, and returns its result. `serve` serves one connection.
///
/// # Panics
///
/// If the client panics or hangs.
pub(crate) fn with_server<S, T>(serve: impl Fn(UnixStream) -> S + 'static, client: impl AsyncFnOnce(&Path) -> T) -> T
where
    S: Future<Output = Option<()>> + 'static,
{
    let_drivers_panic();
    let runtime = Builder::new_current_thread()
        .enable_all()
        .start_paused(true)
        .build()
        .unwrap();
    let folder = Folder::new();
    let done = runtime.block_on(tokio::task::LocalSet::new().run_until(async {
        let listener = UnixListener::bind(folder.0.join(".s.PGSQL.5432")).unwrap();
        tokio::task::spawn_local(async move {
            while let Ok((connection, _)) = listener.accept().await {
                tokio::task::spawn_local(serve(connection));
            }
        });
        let done = tokio::time::timeout(HANGING, client(&folder.0)).await;
        // A driver that connects again holds itself until it has connected or given up.
        tokio::time::sleep(GIVEN_UP).await;
        done
    }));
    done.expect("the operation hangs")
}

/// Checks that a store has an error for a reply that it cannot use.
pub(crate) fn check_error(error: &Error) {
    let is_of_server = matches!(
        error.kind(),
        ErrorKind::Configuration | ErrorKind::CorruptRecord | ErrorKind::StoreFull | ErrorKind::StoreUnavailable
    );
    assert!(is_of_server, "{error:?}");
}

/// The stores catch panics of drivers. The fuzzer ends the process at each panic, so this removes
/// its hook. A panic that reaches the fuzzer still ends the process.
fn let_drivers_panic() {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| drop(std::panic::take_hook()));
}

/// A temporary folder for the socket.
struct Folder(PathBuf);

impl Folder {
    fn new() -> Self {
        static NUMBER: AtomicUsize = AtomicUsize::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("tower-idempotency-{}-{number}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        drop(std::fs::remove_dir_all(&self.0));
    }
}
