//! The connection of a process with the store, the bank and the clients.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use futures::future::BoxFuture;
use tokio::sync::oneshot;
use tower_idempotency::protocol::{
    Claim, Completion, Decision, Fence, Outcome, Owner, Release, Renewal, Resolution, ResolveResult, Snapshot,
    StorageKey,
};
use tower_idempotency::{Error, Store};

use crate::bank::{BankReply, BankRequest};
use crate::history::{Event, History};
use crate::random::Random;

/// An operation of the store, as a message.
#[derive(Clone, Debug)]
pub(crate) enum StoreRequest {
    Claim(Claim),
    Renew(StorageKey, Owner, Duration),
    Complete(StorageKey, Owner, Outcome, Duration),
    Release(StorageKey, Owner),
    Resolve(StorageKey, Fence, Resolution),
    Peek(StorageKey),
    Watch(StorageKey),
}

#[derive(Debug)]
pub(crate) enum StoreReply {
    Claim(Decision),
    Renew(Renewal),
    Complete(Completion),
    Release(Release),
    Resolve(ResolveResult),
    Peek(Option<Snapshot>),
    Watch(oneshot::Receiver<()>),
}

/// The sender of a reply. Dropping it breaks the connection.
pub(crate) type Place<T> = oneshot::Sender<Result<T, Error>>;

/// A message on its way.
pub(crate) enum Message {
    ToStore {
        from: Sender,
        request: StoreRequest,
        place: Option<Place<StoreReply>>,
    },
    FromStore {
        to: Sender,
        key: StorageKey,
        /// The number of the store's last write when it replied.
        number: u64,
        reply: Result<StoreReply, Error>,
        place: Place<StoreReply>,
    },
    /// A watch of the store wakes.
    Wake {
        to: Sender,
        place: oneshot::Sender<()>,
    },
    ToBank {
        from: Sender,
        request: BankRequest,
        place: Place<BankReply>,
    },
    FromBank {
        to: Sender,
        reply: BankReply,
        place: Place<BankReply>,
    },
    ToProcess {
        operation: usize,
        number: usize,
    },
    ToClient {
        operation: usize,
        number: usize,
        response: Answer,
    },
}

/// The process that sends a message, and the number of its incarnation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Sender {
    pub(crate) process: usize,
    pub(crate) incarnation: usize,
}

/// The response to a request of a client.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    /// The code of a refusal; empty for a response of the handler.
    pub(crate) code: &'static str,
    pub(crate) is_replay: bool,
    /// The lines of its head.
    pub(crate) head: Vec<String>,
    pub(crate) body: String,
}

/// A response that has left its process.
pub(crate) struct Responded {
    /// The number of its request.
    pub(crate) request: usize,
    pub(crate) operation: usize,
    pub(crate) answer: Answer,
}

/// The time of arrival of a message, the number of its stream, and its own number.
pub(crate) type MessageId = (Duration, u64, u64);

/// The state of a process that the world changes and its links read.
#[derive(Clone, Debug, Default)]
pub(crate) struct ProcessState {
    pub(crate) incarnation: usize,
    pub(crate) is_dead: bool,
    /// The number of messages after which the process dies.
    pub(crate) dies_after: Option<usize>,
    /// The messages that the process has sent in this tick, by the number of their stream.
    sent: Vec<(u64, MessageId)>,
    pub(crate) cut_requests: bool,
    pub(crate) cut_replies: bool,
    pub(crate) cut_bank: bool,
}

/// The state that processes and the world share.
pub(crate) struct Shared {
    pub(crate) now: Duration,
    pub(crate) messages: BTreeMap<MessageId, Message>,
    sent: u64,
    seed: u64,
    pub(crate) random: Random,
    /// The random choices for the messages of each process about each key. The tasks of different
    /// keys may run in any order.
    streams: HashMap<u64, Random>,
    pub(crate) history: History,
    /// The number of requests that have arrived at a process.
    pub(crate) requests: usize,
    pub(crate) processes: Vec<ProcessState>,
    pub(crate) store_is_down: bool,
    pub(crate) store_is_slow: bool,
    pub(crate) duplicates: bool,
    /// Whether some messages to and from the bank are lost.
    pub(crate) loses_bank_messages: bool,
    /// The places of lost messages. As long as they exist, their senders wait.
    lost: Vec<Box<dyn Send>>,
    /// Requests whose responses have left their processes since the world looked.
    pub(crate) responded: Vec<Responded>,
}

impl Shared {
    pub(crate) fn new(seed: u64, processes: usize) -> Self {
        Self {
            now: Duration::ZERO,
            messages: BTreeMap::new(),
            sent: 0,
            seed,
            random: Random::new(seed, 3),
            streams: HashMap::new(),
            requests: 0,
            history: History::default(),
            processes: vec![ProcessState::default(); processes],
            store_is_down: false,
            store_is_slow: false,
            duplicates: false,
            loses_bank_messages: false,
            lost: Vec::new(),
            responded: Vec::new(),
        }
    }

    /// The number of messages so far.
    pub(crate) fn sent(&self) -> usize {
        usize::try_from(self.sent).unwrap()
    }

    /// Sends a message that takes this long.
    pub(crate) fn send(&mut self, latency: Duration, message: Message) -> MessageId {
        self.send_in(0, latency, message)
    }

    fn send_in(&mut self, stream: u64, latency: Duration, message: Message) -> MessageId {
        self.sent += 1;
        let id = (self.now + latency, stream, self.sent);
        self.messages.insert(id, message);
        id
    }

    /// Sends a message to or from the store.
    pub(crate) fn send_about(&mut self, key: &StorageKey, sender: Sender, message: Message) -> MessageId {
        self.send_to_store(number_of(key), sender, message)
    }

    fn send_to_store(&mut self, stream: u64, sender: Sender, message: Message) -> MessageId {
        let stream = stream_of(stream, sender);
        let latency = self.store_latency(stream);
        self.send_in(stream, latency, message)
    }

    /// Sends a second copy of a message to the store.
    fn send_copy(&mut self, stream: u64, sender: Sender, message: Message) -> MessageId {
        let stream = stream_of(stream, sender);
        let mut latency = self.store_latency(stream) + Duration::from_millis(5);
        let random = self.stream(stream);
        if random.chance(30) {
            latency += random.millis(0..5_000);
        }
        self.send_in(stream, latency, message)
    }

    fn stream(&mut self, stream: u64) -> &mut Random {
        let seed = self.seed;
        self.streams.entry(stream).or_insert_with(|| Random::new(seed, stream))
    }

    /// Notes a message that a process has sent.
    fn sent_by(&mut self, sender: Sender, id: MessageId) {
        self.processes[sender.process].sent.push((id.1, id));
    }

    /// Ends a tick of a process. If the process dies in this tick, its last messages are not sent.
    /// The streams decide which messages are the last, because the tasks of different keys run in
    /// any order within a tick.
    pub(crate) fn end_tick(&mut self, number: usize) {
        let process = &mut self.processes[number];
        let mut sent = std::mem::take(&mut process.sent);
        let Some(left) = process.dies_after.filter(|_| !process.is_dead) else {
            return;
        };
        sent.sort_by_key(|(stream, (.., number))| (*stream, *number));
        process.dies_after = left.checked_sub(sent.len());
        process.is_dead = process.dies_after.is_none();
        for (_, id) in sent.iter().skip(left) {
            self.messages.remove(id);
        }
    }

    pub(crate) fn latency(&mut self) -> Duration {
        self.random.millis(0..12)
    }

    fn store_latency(&mut self, stream: u64) -> Duration {
        let longest = if self.store_is_slow { 1_000 } else { 12 };
        self.stream(stream).millis(0..longest)
    }

    /// Breaks all connections with the store. Their messages are lost.
    pub(crate) fn reset_store_connections(&mut self) {
        self.messages.retain(|_, message| {
            !matches!(
                message,
                Message::ToStore { .. } | Message::FromStore { .. } | Message::Wake { .. }
            )
        });
    }

    /// Keeps the place of a lost message, so that its sender waits.
    pub(crate) fn lose(&mut self, place: impl Send + 'static) {
        self.lost.push(Box::new(place));
    }

    pub(crate) fn is_alive(&self, sender: Sender) -> bool {
        let process = &self.processes[sender.process];
        !process.is_dead && process.incarnation == sender.incarnation
    }

    pub(crate) fn note(&mut self, event: Event) {
        self.history.note(self.now, event);
    }
}

fn number_of(key: &StorageKey) -> u64 {
    let (number, _) = key.as_bytes().split_first_chunk().unwrap();
    u64::from_be_bytes(*number)
}

/// Returns the number of the stream of messages of a process.
fn stream_of(stream: u64, sender: Sender) -> u64 {
    let process = u64::try_from(sender.process).unwrap();
    (stream | 1 << 63) ^ process
}

impl StoreRequest {
    /// Returns the number of the stream of this request. A process renews the leases of one key in
    /// any order, so each of them has a stream of its own.
    fn stream(&self) -> u64 {
        let of_lease = match self {
            Self::Renew(_, owner, _) => owner.fence.as_u64(),
            _ => 0,
        };
        number_of(&self.key()) ^ of_lease
    }
}

/// The link of one incarnation of a process.
#[derive(Clone)]
pub(crate) struct Link {
    pub(crate) shared: Arc<Mutex<Shared>>,
    pub(crate) sender: Sender,
}

impl Link {
    pub(crate) fn lock(&self) -> MutexGuard<'_, Shared> {
        self.shared.lock().unwrap()
    }

    /// Notes an event, unless the process is dead. Destructors run after a process was killed, and
    /// nobody sees what they do.
    pub(crate) fn note(&self, event: Event) {
        let mut shared = self.lock();
        if shared.is_alive(self.sender) {
            shared.note(event);
        }
    }

    async fn store(&self, request: StoreRequest) -> Result<StoreReply, Error> {
        let (place, reply) = oneshot::channel();
        {
            let mut shared = self.lock();
            if !shared.is_alive(self.sender) || shared.processes[self.sender.process].cut_requests {
                shared.lose(place);
            } else {
                let (stream, from) = (request.stream(), self.sender);
                if shared.duplicates {
                    let (request, place) = (request.clone(), None);
                    let id = shared.send_copy(stream, from, Message::ToStore { from, request, place });
                    shared.sent_by(from, id);
                }
                let place = Some(place);
                let id = shared.send_to_store(stream, from, Message::ToStore { from, request, place });
                shared.sent_by(from, id);
            }
        }
        reply
            .await
            .unwrap_or_else(|_| Err(Error::unavailable("the connection was reset")))
    }

    pub(crate) async fn bank(&self, request: BankRequest) -> Result<BankReply, Error> {
        let (place, reply) = oneshot::channel();
        {
            let mut shared = self.lock();
            let is_lost = shared.loses_bank_messages && shared.random.chance(6);
            let is_late = shared.loses_bank_messages && shared.random.chance(6);
            if is_lost || !shared.is_alive(self.sender) || shared.processes[self.sender.process].cut_bank {
                shared.lose(place);
            } else {
                let late = if is_late {
                    shared.random.millis(0..2_500)
                } else {
                    Duration::ZERO
                };
                let latency = shared.latency() + late;
                let from = self.sender;
                let id = shared.send(latency, Message::ToBank { from, request, place });
                shared.sent_by(from, id);
            }
        }
        reply
            .await
            .unwrap_or_else(|_| Err(Error::unavailable("the connection was reset")))
    }

    /// Sends the response of a request to its client.
    pub(crate) fn respond(&self, request: usize, operation: usize, number: usize, response: Answer) {
        let mut shared = self.lock();
        if shared.is_alive(self.sender) {
            shared.responded.push(Responded {
                request,
                operation,
                answer: response.clone(),
            });
            let latency = shared.latency();
            let id = shared.send(
                latency,
                Message::ToClient {
                    operation,
                    number,
                    response,
                },
            );
            shared.sent_by(self.sender, id);
        }
    }
}

/// The store as a process sees it. It sends messages, and some of them do not arrive.
#[derive(Clone)]
pub(crate) struct RemoteStore(pub(crate) Link);

macro_rules! reply_of {
    ($kind:ident, $reply:expr) => {
        match $reply? {
            StoreReply::$kind(reply) => Ok(reply),
            other => panic!("a reply to another message: {other:?}"),
        }
    };
}

impl Store for RemoteStore {
    type Watch = BoxFuture<'static, ()>;

    async fn claim(&self, claim: &Claim) -> Result<Decision, Error> {
        reply_of!(Claim, self.0.store(StoreRequest::Claim(claim.clone())).await)
    }

    async fn renew(&self, key: &StorageKey, owner: Owner, lease: Duration) -> Result<Renewal, Error> {
        reply_of!(Renew, self.0.store(StoreRequest::Renew(*key, owner, lease)).await)
    }

    async fn complete(
        &self,
        key: &StorageKey,
        owner: Owner,
        outcome: &Outcome,
        retention: Duration,
    ) -> Result<Completion, Error> {
        let request = StoreRequest::Complete(*key, owner, outcome.clone(), retention);
        reply_of!(Complete, self.0.store(request).await)
    }

    async fn release(&self, key: &StorageKey, owner: Owner) -> Result<Release, Error> {
        reply_of!(Release, self.0.store(StoreRequest::Release(*key, owner)).await)
    }

    async fn resolve(&self, key: &StorageKey, fence: Fence, resolution: &Resolution) -> Result<ResolveResult, Error> {
        let request = StoreRequest::Resolve(*key, fence, resolution.clone());
        reply_of!(Resolve, self.0.store(request).await)
    }

    async fn peek(&self, key: &StorageKey) -> Result<Option<Snapshot>, Error> {
        reply_of!(Peek, self.0.store(StoreRequest::Peek(*key)).await)
    }

    async fn watch(&self, key: &StorageKey) -> Result<Self::Watch, Error> {
        let watch: Result<oneshot::Receiver<()>, Error> =
            reply_of!(Watch, self.0.store(StoreRequest::Watch(*key)).await);
        let watch = watch?;
        Ok(Box::pin(async move { drop(watch.await) }))
    }
}
