//! The plan of a history: the layers, their settings, the calls, and the event of each request.

use std::fmt;
use std::time::Duration;

use http::Method;

use crate::random::Random;

pub(super) const HOME: &str = "http://bank.example";
pub(super) const OTHER: &str = "http://other.example";
/// The body of every request.
pub(super) const BODY: &str = "amount=4200";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Transport {
    /// A service of tower that acts as the plan says, under paused time.
    Scripted,
    /// `ReqwestService` over TCP.
    Reqwest,
}

/// The events of one request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Event {
    NotConnected,
    /// The connection was made and broke before the request was sent.
    ResetBefore,
    ResetAfter,
    TimedOut,
    Respond {
        status: u16,
        /// The seconds in `Retry-After`.
        retry_after: Option<u64>,
        /// The body of the response breaks off.
        is_broken: bool,
    },
    Redirect {
        status: u16,
        to: Target,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Target {
    Home,
    Other,
    /// A path without a host.
    Relative,
}

/// A retry layer of the application, which knows nothing of this crate. It repeats after an error,
/// a 429 and a 503.
#[derive(Clone, Copy, Debug)]
pub(super) struct Foreign {
    pub(super) repeats: u32,
    pub(super) pause: Duration,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Once {
    pub(super) keys_are_honoured: bool,
    pub(super) at_least_once: bool,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Calls {
    pub(super) collects: bool,
    pub(super) max_attempts: u32,
    pub(super) horizon: Duration,
    /// Nine tenths of the retention of the third party.
    pub(super) known: Duration,
}

impl Calls {
    /// One attempt, without a limit of time.
    pub(super) const fn once() -> Self {
        Self {
            collects: false,
            max_attempts: 1,
            horizon: Duration::MAX,
            known: Duration::from_secs(3600),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Keys {
    Caller,
    Derived,
    Random,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Call {
    pub(super) operation: usize,
    pub(super) is_safe: bool,
    /// The time since the end of the call before.
    pub(super) pause: Duration,
}

impl Call {
    pub(super) fn method(&self) -> Method {
        if self.is_safe { Method::GET } else { Method::POST }
    }
}

/// A request that the third party expects.
#[derive(Clone, Copy, Debug)]
pub(super) struct Step {
    pub(super) event: Event,
    pub(super) takes: Duration,
}

/// The layers from the outermost one: the keys, `once`, a foreign retry layer `around` the calls, a
/// `timeout` of each of its calls, the `calls`, a foreign retry layer `within` them, and the redirects.
#[derive(Clone, Debug)]
pub(super) struct Plan {
    pub(super) seed: u64,
    pub(super) transport: Transport,
    pub(super) keys: Keys,
    pub(super) once: Option<Once>,
    pub(super) around: Option<Foreign>,
    /// The layer drops a call that takes longer.
    pub(super) timeout: Option<Duration>,
    pub(super) calls_layer: Option<Calls>,
    pub(super) within: Option<Foreign>,
    pub(super) redirects: bool,
    pub(super) calls: Vec<Call>,
    pub(super) steps: Vec<Step>,
}

impl fmt::Display for Plan {
    /// Displays the layers and the calls. The log shows the steps.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "  {:?}, keys: {:?}, redirects: {}",
            self.transport, self.keys, self.redirects
        )?;
        writeln!(f, "  once: {:?}", self.once)?;
        writeln!(f, "  around: {:?}, timeout: {:?}", self.around, self.timeout)?;
        writeln!(f, "  calls: {:?}", self.calls_layer)?;
        writeln!(f, "  within: {:?}", self.within)?;
        self.calls.iter().try_for_each(|call| writeln!(f, "  {call:?}"))
    }
}

impl Plan {
    pub(super) fn of(seed: u64, transport: Transport) -> Self {
        let random = &mut Random::new(seed, 1);
        let is_tcp = transport == Transport::Reqwest;
        let once = random.chance(60).then(|| Once {
            keys_are_honoured: random.chance(30),
            at_least_once: random.chance(25),
        });
        let has_calls = once.is_none() || random.chance(65);
        let redirects = is_tcp || random.chance(60);
        let keys: &[Keys] = match once {
            Some(_) => &[Keys::Caller, Keys::Derived],
            None => &[Keys::Caller, Keys::Derived, Keys::Random],
        };
        let is_safe = once.is_none() && !is_tcp && random.chance(20);
        Self {
            seed,
            transport,
            keys: random.pick(if is_safe { &[Keys::Caller] } else { keys }),
            once,
            around: (has_calls && random.chance(25)).then(|| foreign(random, is_tcp)),
            timeout: None,
            calls_layer: has_calls.then(|| calls(random, is_tcp)),
            // Without a redirect policy or `ReqwestService`, no layer can see these repeats.
            within: (redirects && random.chance(30)).then(|| foreign(random, is_tcp)),
            redirects,
            calls: (0..=random.below(4))
                .map(|_| Call {
                    operation: random.below(2),
                    is_safe,
                    pause: random.millis(0..600) * 100,
                })
                .collect(),
            steps: (0..=random.below(9)).map(|_| step(random, is_tcp)).collect(),
        }
    }

    /// Returns the plan of a history in which a layer drops calls.
    pub(super) fn with_timeout(seed: u64) -> Self {
        let random = &mut Random::new(seed, 2);
        let plan = Self::of(seed, Transport::Scripted);
        Self {
            around: Some(foreign(random, false)),
            timeout: Some(random.millis(1..25) * 100 + Duration::from_millis(50)),
            calls_layer: plan.calls_layer.or_else(|| Some(calls(random, false))),
            ..plan
        }
    }
}

fn foreign(random: &mut Random, is_tcp: bool) -> Foreign {
    Foreign {
        repeats: random.pick(&[1, 2]),
        pause: if is_tcp {
            Duration::ZERO
        } else {
            random.millis(0..30) * 100
        },
    }
}

/// Every limit ends between two tenths of a second, and every event at one, so the clock of tokio,
/// which counts whole milliseconds, never decides.
fn calls(random: &mut Random, is_tcp: bool) -> Calls {
    let mut limit = || {
        let tenths = if is_tcp {
            10_000
        } else {
            random.pick(&[9, 30, 100, 300, 5000])
        };
        Duration::from_millis(tenths * 100 + 50)
    };
    let (horizon, known) = (limit(), limit());
    Calls {
        collects: random.chance(40),
        max_attempts: random.pick(&[1, 2, 3, 5, 9]),
        horizon,
        known,
    }
}

fn step(random: &mut Random, is_tcp: bool) -> Step {
    let mut retry_after = |percent| {
        let seconds = random.pick(&[0, 1, 2, 4, 9, 20]);
        random.chance(percent).then_some(if is_tcp { 0 } else { seconds })
    };
    let (sometimes, always) = (retry_after(40), retry_after(100));
    let is_broken = random.chance(20);
    let mut respond = |statuses: &[u16], retry_after| Event::Respond {
        status: random.pick(statuses),
        retry_after,
        is_broken,
    };
    let events = [
        Event::NotConnected,
        Event::NotConnected,
        Event::ResetBefore,
        Event::ResetAfter,
        if is_tcp { Event::ResetAfter } else { Event::TimedOut },
        respond(&[409], always),
        respond(&[425, 429], sometimes),
        respond(&[425, 429], sometimes),
        respond(&[408, 500, 503], sometimes),
        respond(&[503], sometimes),
        respond(&[200, 201, 402, 409, 422], None),
        respond(&[401, 404, 413], None),
        Event::Redirect {
            status: random.pick(&[301, 302, 303, 307, 308]),
            to: random.pick(&[Target::Home, Target::Other, Target::Relative]),
        },
        Event::Redirect {
            status: random.pick(&[307, 308]),
            to: random.pick(&[Target::Home, Target::Relative]),
        },
    ];
    Step {
        event: random.pick(&events),
        takes: if is_tcp {
            Duration::ZERO
        } else {
            random.millis(0..25) * 100
        },
    }
}
