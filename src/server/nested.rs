//! A layer inside another layer with the same key.

use std::sync::Arc;

use http::request::Parts;
use http::{Request, Response};

use super::buffering::{Buffering, RequestKey};
use super::future::ResponseFuture;
use super::guard::Shared;
use super::settings::Values;
use crate::error::{Error, ErrorKind};
use crate::http::{HttpService, RebuildBody};
use crate::protocol::{Owner, Snapshot, Status, StorageKey};
use crate::store::{Store, with_timeout};
use crate::telemetry::{self, Event};

/// A request whose storage key an outer layer has claimed, in the same store or in another one.
///
/// Neither the name of the key nor the handle of the store shows whether both layers guard the same
/// record. Two stores may have records of the same name, and two handles may reach the same store.
/// So the inner layer looks at the record in its own store. If the record belongs to the attempt of
/// the outer layer, both layers would wait for each other, so the inner layer passes the request
/// on.
pub(super) struct Nested<St, S, B> {
    pub(super) shared: Arc<Shared<St>>,
    pub(super) settings: Arc<Values>,
    pub(super) names: RequestKey,
    pub(super) service: S,
    pub(super) head: Parts,
    pub(super) body: B,
    /// The owners under this storage key in outer layers.
    pub(super) owners: Vec<Owner>,
}

impl<St, S, B> Nested<St, S, B>
where
    S: HttpService<B> + Clone,
    St: Store,
    B: RebuildBody<Error: Send> + Send + 'static,
{
    /// Passes the request on or guards it.
    ///
    /// # Cancel safety
    ///
    /// If this future is dropped before the request is guarded, nothing has happened. After that,
    /// the rules of a guarded request apply.
    pub(super) async fn finish(self) -> Result<Response<S::ResponseBody>, S::Error> {
        let Self {
            shared,
            settings,
            names,
            mut service,
            head,
            body,
            owners,
        } = self;
        match is_owned_by(&shared.store, &settings, &names.storage_key, &owners).await {
            Ok(true) => {}
            Ok(false) => {
                let buffering = Buffering::new(shared, settings, names, service, head, body);
                return ResponseFuture::<S::Future, _, _>::guarded(Box::new(buffering)).await;
            }
            Err(error) => {
                telemetry::store_failed(&error);
                if !settings.run_unprotected || error.kind() != ErrorKind::StoreUnavailable {
                    return Ok(settings.refuse(None, Some(&head), settings.store_failed(&error)));
                }
                telemetry::event(Event::Unprotected);
            }
        }
        service.call(Request::from_parts(head, body)).await
    }
}

/// Whether the record belongs to one of these owners. If the store fails, looks once more, as for a
/// claim.
async fn is_owned_by<St: Store>(
    store: &St,
    settings: &Values,
    key: &StorageKey,
    owners: &[Owner],
) -> Result<bool, Error> {
    let peek = || with_timeout(settings.engine.store_timeout, store.peek(key));
    let peeked = match peek().await {
        Err(error) if error.kind() == ErrorKind::StoreUnavailable => peek().await,
        peeked => peeked,
    };
    Ok(peeked?.is_some_and(|snapshot| {
        let Snapshot {
            nonce, fence, status, ..
        } = snapshot;
        !matches!(status, Status::Completed(_)) && owners.contains(&Owner { nonce, fence })
    }))
}
