//! A TCP proxy that breaks the connections through it, and the checks that the operations of a
//! store survive it.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Notify;
use tower_idempotency::{Error, ErrorKind, Store};

use super::operation::{Case, Operation};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    ToServer,
    ToClient,
}

/// The fate of all bytes from now on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// The bytes pass.
    Pass,
    /// After this number of bytes in one direction, the proxy cuts every connection.
    CutAfter(Direction, usize),
    /// The bytes of one direction vanish.
    Swallow(Direction),
    /// The bytes of both directions vanish.
    SwallowAll,
    /// The bytes are delayed by this time.
    Delay(Duration),
}

#[derive(Clone)]
pub struct Proxy {
    pub address: SocketAddr,
    state: Arc<State>,
}

struct State {
    /// The server to which new connections lead.
    server: Mutex<SocketAddr>,
    fate: Mutex<Fate>,
    cut: Notify,
    /// Whether the proxy has cut a connection since the fate was set.
    was_cut: AtomicBool,
}

impl Proxy {
    pub async fn to(server: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let state = Arc::new(State {
            server: Mutex::new(server),
            fate: Mutex::new(Fate::Pass),
            cut: Notify::new(),
            was_cut: AtomicBool::new(false),
        });
        let shared = Arc::clone(&state);
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let server = *shared.server.lock().unwrap();
                let Ok(server) = TcpStream::connect(server).await else {
                    continue;
                };
                for stream in [&client, &server] {
                    stream.set_nodelay(true).unwrap();
                }
                let ((from_client, to_client), (from_server, to_server)) = (client.into_split(), server.into_split());
                tokio::spawn(pass(from_client, to_server, Direction::ToServer, Arc::clone(&shared)));
                tokio::spawn(pass(from_server, to_client, Direction::ToClient, Arc::clone(&shared)));
            }
        });
        Self { address, state }
    }

    pub fn set(&self, fate: Fate) {
        *self.state.fate.lock().unwrap() = fate;
        self.state.was_cut.store(false, Ordering::SeqCst);
    }

    /// Leads all new connections to another server, and cuts the present ones.
    pub fn lead_to(&self, server: SocketAddr) {
        *self.state.server.lock().unwrap() = server;
        self.state.cut.notify_waiters();
    }

    /// Whether the proxy has cut a connection since the fate was set.
    pub fn was_cut(&self) -> bool {
        self.state.was_cut.load(Ordering::SeqCst)
    }

    /// Lets everything pass again after each cut, until the future is dropped.
    pub async fn heal_for_new_connections(&self) -> Infallible {
        loop {
            let mut cut = std::pin::pin!(self.state.cut.notified());
            cut.as_mut().enable();
            if !self.was_cut() {
                cut.await;
            }
            self.heal();
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    /// Lets everything pass again, even on connections that have lost bytes.
    pub fn pass(&self) {
        *self.state.fate.lock().unwrap() = Fate::Pass;
    }

    /// Lets everything pass again and returns whether the proxy has cut a connection. TCP never
    /// omits bytes, so the proxy cuts every connection.
    pub fn heal(&self) -> bool {
        let fate = std::mem::replace(&mut *self.state.fate.lock().unwrap(), Fate::Pass);
        if matches!(fate, Fate::Swallow(_) | Fate::SwallowAll) {
            self.state.cut.notify_waiters();
        }
        matches!(fate, Fate::CutAfter(_, 0))
    }
}

async fn pass(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, direction: Direction, state: Arc<State>) {
    let mut buffer = vec![0; 64 << 10];
    loop {
        let mut cut = std::pin::pin!(state.cut.notified());
        cut.as_mut().enable();
        let read = tokio::select! {
            read = from.read(&mut buffer) => read.unwrap_or(0),
            () = cut => 0,
        };
        if read == 0 {
            return;
        }
        let (passing, cut, delay) = state.judge(direction, read);
        tokio::time::sleep(delay).await;
        if to.write_all(&buffer[..passing]).await.is_err() {
            return;
        }
        if cut {
            state.was_cut.store(true, Ordering::SeqCst);
            state.cut.notify_waiters();
            return;
        }
    }
}

impl State {
    /// Returns how many of these bytes pass, whether the proxy then cuts every connection, and the
    /// delay.
    fn judge(&self, direction: Direction, read: usize) -> (usize, bool, Duration) {
        let mut fate = self.fate.lock().unwrap();
        match &mut *fate {
            Fate::CutAfter(of, left) if *of == direction => {
                let passing = read.min(*left);
                *left -= passing;
                (passing, *left == 0, Duration::ZERO)
            }
            Fate::Swallow(of) if *of == direction => (0, false, Duration::ZERO),
            Fate::SwallowAll => (0, false, Duration::ZERO),
            Fate::Delay(delay) => (read, false, *delay),
            _ => (read, false, Duration::ZERO),
        }
    }
}

/// Returns the reply, or nothing if the store is unreachable. Panics on any other error.
fn judged<T>(result: Result<T, Error>) -> Option<T> {
    match result {
        Ok(value) => Some(value),
        Err(error) => {
            assert_eq!(error.kind(), ErrorKind::StoreUnavailable, "{error:?}");
            None
        }
    }
}

/// Runs the operation through the proxy while `cut` takes effect. Then repeats the operation
/// directly, and checks the record. Returns whether the reply arrived.
async fn survive<S: Store>(operation: &Operation, proxied: &S, direct: &S, cut: impl FnOnce() + Send) -> bool {
    let case = Case::new(operation, direct).await;
    cut();
    let reply = judged(case.run(proxied).await);
    if let Some(reply) = &reply {
        case.check(reply, false);
    }
    case.repeat(reply.as_ref(), direct).await;
    reply.is_some()
}

/// The positions of the cuts.
#[derive(Clone, Copy, Debug)]
struct Cuts {
    /// Whether the same operation opens the connection, so that its statement is prepared.
    /// Otherwise another operation opens it.
    prepared: bool,
    first: usize,
    step: usize,
}

/// The distance between two cuts in bytes, unless the tests are thorough. It is a prime, so that
/// the cuts fall on every part of a frame.
const SAMPLE: usize = 11;

/// The distance between two cuts of a variant in bytes, unless the tests are thorough. The first
/// cut is after the first byte, so each variant loses its request and its reply.
const FEW: usize = 211;

/// Cuts every operation after every byte in both directions. If the tests are not thorough, cuts one
/// operation of each kind after every eleventh byte, and its variants once or twice. Returns the
/// number of bytes that this covers.
///
/// Reconnecting takes most of the time. Therefore several stores, each behind its own proxy, share
/// the bytes.
pub async fn cut_after_every_byte<S: Store + Clone>(proxied: Vec<(S, Proxy)>, direct: &S) -> usize {
    cut_everywhere(proxied, direct, true, 1).await
}

/// Cuts every operation in both directions while it is the first of its kind on its connection,
/// which makes it send more bytes. Cuts after every fifth byte, or after every 55th if the tests
/// are not thorough. Returns the number of cuts, scaled up to a thorough run.
pub async fn cut_while_preparing<S: Store + Clone>(proxied: Vec<(S, Proxy)>, direct: &S) -> usize {
    cut_everywhere(proxied, direct, false, 5).await
}

async fn cut_everywhere<S: Store + Clone>(proxied: Vec<(S, Proxy)>, direct: &S, prepared: bool, step: usize) -> usize {
    let stores = proxied.len();
    let sample = if super::settings::is_thorough() { 1 } else { SAMPLE };
    let step = step * sample;
    // A connection that already listens may serve a watch, so a watch may send nothing.
    let kinds = Operation::kinds().into_iter();
    let kinds: Vec<_> = kinds.filter(|kind| !matches!(kind, Operation::Watch)).collect();
    let shares = proxied.into_iter().enumerate().map(|(share, (store, proxy))| {
        let (direct, kinds) = (direct.clone(), kinds.clone());
        tokio::spawn(async move {
            let cuts = Cuts {
                prepared,
                // A cut before the first byte is the same as a cut after zero bytes.
                first: 1 + share * step,
                step: stores * step,
            };
            let variants = Operation::variants().into_iter();
            let variants: Vec<_> = match (super::settings::is_thorough(), prepared) {
                (true, _) => variants.map(|variant| (variant, cuts)).collect(),
                (false, true) => {
                    let cuts = Cuts {
                        first: 1,
                        step: FEW,
                        ..cuts
                    };
                    let own = variants.skip(share).step_by(stores);
                    own.map(|variant| (variant, cuts)).collect()
                }
                (false, false) => Vec::new(),
            };
            let mut made = 0;
            for (operation, cuts) in kinds.into_iter().map(|kind| (kind, cuts)).chain(variants) {
                for direction in [Direction::ToServer, Direction::ToClient] {
                    made += cut(&operation, direction, cuts, (&store, &proxy), &direct).await;
                }
            }
            made
        })
    });
    let made = futures::future::join_all(shares.collect::<Vec<_>>()).await;
    sample * made.into_iter().map(Result::unwrap).sum::<usize>()
}

/// Cuts the operation at each position until it has no more bytes. Returns the number of cuts.
async fn cut<S: Store>(
    operation: &Operation,
    direction: Direction,
    cuts: Cuts,
    (proxied, proxy): (&S, &Proxy),
    direct: &S,
) -> usize {
    let before = match operation {
        _ if cuts.prepared => operation,
        Operation::Peek => &Operation::Release(1),
        _ => &Operation::Peek,
    };
    for (made, bytes) in (cuts.first..).step_by(cuts.step).enumerate() {
        let mut tries = 0;
        let is_over = loop {
            connected(before, proxied, direct).await;
            let cut = || proxy.set(Fate::CutAfter(direction, bytes));
            let has_reply = survive(operation, proxied, direct, cut).await;
            let was_cut = proxy.heal();
            if was_cut || has_reply {
                break !was_cut;
            }
            // The operation failed before it had sent this many bytes, because the machine is busy.
            tries += 1;
            assert!(tries < 20, "{operation:?} fails without a cut");
        };
        if is_over {
            assert!(bytes > 10, "{operation:?} sends nothing");
            return made;
        }
    }
    unreachable!()
}

/// Reconnects and runs an operation.
async fn connected<S: Store>(operation: &Operation, proxied: &S, direct: &S) {
    for _ in 0..100 {
        if survive(operation, proxied, direct, || {}).await {
            return;
        }
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    panic!("the store does not reconnect");
}

/// Delays the replies to all operations until their callers have given up, and lets the callers
/// repeat them while the late replies arrive. `proxied` gives up after less than half of `delay`.
pub async fn reply_late<S: Store>((proxied, proxy): (&S, &Proxy), direct: &S, delay: Duration) {
    let operations = Operation::all();
    let cases = operations.iter().map(|operation| Case::new(operation, direct));
    let cases = futures::future::join_all(cases).await;
    proxy.set(Fate::Delay(delay));
    let late = futures::future::join_all(cases.iter().map(|case| case.run(proxied))).await;
    proxy.heal();
    for (case, late) in cases.iter().zip(late) {
        let is_local = matches!(case.operation, Operation::Watch);
        assert!(is_local || judged(late).is_none(), "{:?}", case.operation);
    }
    let repeated = cases.iter().map(async |case| {
        let reply = case.repeat_until_it_succeeds(proxied).await;
        case.repeat(Some(&reply), direct).await;
    });
    futures::future::join_all(repeated).await;
}
