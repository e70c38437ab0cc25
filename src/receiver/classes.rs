//! The effect of a handler's error on its message.

use std::any::Any;
use std::fmt;
use std::sync::Arc;

use crate::engine::OnError;
use crate::telemetry::{self, Event};

/// The effect of a handler's error on its message, as
/// [`with_error_class`](super::ReceiverLayer::with_error_class) decides it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[expect(clippy::exhaustive_enums, reason = "a broker delivers again or does not")]
pub enum HandlerErrorClass {
    /// Another delivery may succeed, for example after a lost connection or a timeout. The key
    /// follows [`on_error`](super::ReceiverLayer::on_error), where [`OnError::Reject`] counts as
    /// [`OnError::Release`].
    Redeliver,
    /// No other delivery will succeed, for example because the message cannot be parsed, or breaks
    /// a rule. The layer rejects the message for good.
    Reject,
}

type Classify = Arc<dyn Fn(&dyn Any) -> Option<HandlerErrorClass> + Send + Sync>;

/// The classifier of the application, if there is one.
#[derive(Clone, Default)]
pub(super) struct ErrorClasses(Option<Classify>);

impl ErrorClasses {
    pub(super) fn by<E: 'static>(classify: impl Fn(&E) -> HandlerErrorClass + Send + Sync + 'static) -> Self {
        Self(Some(Arc::new(move |error| error.downcast_ref().map(&classify))))
    }

    /// Returns the effect of an error of the handler on its key.
    pub(super) fn end_of<E: 'static>(&self, error: &E, on_error: OnError) -> OnError {
        let Some(classify) = &self.0 else { return on_error };
        match classify(error) {
            Some(HandlerErrorClass::Reject) => OnError::Reject,
            Some(HandlerErrorClass::Redeliver) if on_error == OnError::Reject => OnError::Release,
            Some(HandlerErrorClass::Redeliver) => on_error,
            None => {
                telemetry::event(Event::ErrorUnclassified);
                on_error
            }
        }
    }
}

impl fmt::Debug for ErrorClasses {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.0 {
            Some(_) => "ErrorClasses(..)",
            None => "ErrorClasses(none)",
        })
    }
}
