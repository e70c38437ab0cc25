//! The reasons of refusals, and their meaning for the effect of the request.

use crate::protocol::InvalidKey;

/// The effect of a refused request, as far as its refusal shows it to the outer layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Effect {
    /// The request took effect, and its response is lost.
    Done,
    /// The handler failed, and may have had an effect.
    Failed,
    /// The request had no effect.
    Nothing,
    /// Nobody knows whether the request took effect.
    Unknown,
}

/// The reasons why the layer itself returns a response.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum RefusalKind {
    /// The request took effect, but its response broke off and could not be stored. 500.
    ResponseBroken,
    /// The request took effect, and its response was not stored. 409.
    ResponseNotStored,
    /// The request's body broke off. 400.
    BodyBroken,
    /// The request's body did not arrive within the set time. 408.
    BodyTimeout,
    /// The request's body is longer than the limit. 413.
    BodyTooLarge,
    /// The recovery check could not decide whether an earlier, lost attempt took effect. The next
    /// request with this key calls the check again. 409.
    CheckUndecided,
    /// The request took effect, and its stored response has an encoding (`grpc-encoding`) that this
    /// client does not accept. 406.
    EncodingNotAccepted,
    /// The handler panicked, its service failed, or a response broke off that was not to be stored.
    /// 500.
    HandlerFailed,
    /// The request's key cannot be used. 400.
    InvalidKey(InvalidKey),
    /// The webhook is not genuine, or it has no id. 401.
    InvalidWebhook,
    /// The webhook was sent with another method than POST. 405.
    InvalidWebhookMethod,
    /// The layer requires a key, and the request has none. 400.
    MissingKey,
    /// The application's function found no scope, so the owner of the key is unknown. 500.
    MissingScope,
    /// The key was used for another request. 422.
    Mismatch,
    /// The handler needs a key, and no layer covers the request. 500.
    NotCovered,
    /// The inner service did not accept the request, and nothing was processed. 503.
    NotRun,
    /// A request with this key is in flight. 409.
    Outstanding,
    /// An earlier attempt was lost, and nobody knows whether it took effect. 409, code
    /// `outcome-unknown`, not retryable.
    OutcomeUnknown,
    /// The request was processed, and its outcome could not be recorded. 503, code
    /// `outcome-unknown`, retryable.
    OutcomeUnrecorded,
    /// The limit of executions without a caller is reached, so the layer starts no new execution.
    /// 503.
    Overloaded,
    /// The record of the key is damaged or of a newer version. 500.
    RecordUnreadable,
    /// The store accepts no new keys for now. 503.
    StoreFull,
    /// The store cannot be used until an operator corrects it. Examples are a missing table, a
    /// missing right and a read-only server. 500.
    StoreMisconfigured,
    /// The store does not respond. 503.
    StoreUnavailable,
    /// Too many duplicates are waiting already. 409.
    TooManyWaiters,
}

impl RefusalKind {
    /// Returns the effect of a request that was refused for this reason.
    pub(super) const fn effect(self) -> Effect {
        match self {
            Self::ResponseBroken | Self::ResponseNotStored | Self::EncodingNotAccepted => Effect::Done,
            Self::HandlerFailed => Effect::Failed,
            // The unreadable record may belong to an earlier attempt that took effect.
            Self::CheckUndecided | Self::OutcomeUnknown | Self::OutcomeUnrecorded | Self::RecordUnreadable => {
                Effect::Unknown
            }
            // The handler did not get the request.
            Self::BodyBroken
            | Self::BodyTimeout
            | Self::BodyTooLarge
            | Self::InvalidKey(_)
            | Self::InvalidWebhook
            | Self::InvalidWebhookMethod
            | Self::MissingKey
            | Self::MissingScope
            | Self::Mismatch
            | Self::NotCovered
            | Self::NotRun
            | Self::Outstanding
            | Self::Overloaded
            | Self::StoreFull
            | Self::StoreMisconfigured
            | Self::StoreUnavailable
            | Self::TooManyWaiters => Effect::Nothing,
        }
    }

    /// Returns the kind that replaces this one if the handler has run and lost the key to another
    /// attempt. `None` if this kind is still true for that request.
    pub(crate) const fn after_run(self) -> Option<Self> {
        match self {
            // The key belongs to another request by now.
            Self::Mismatch => Some(Self::OutcomeUnknown),
            Self::Overloaded | Self::StoreFull | Self::StoreMisconfigured | Self::StoreUnavailable => {
                Some(Self::OutcomeUnrecorded)
            }
            _ => None,
        }
    }
}
