//! TLS by rustls, where a feature brings it.

use std::error::Error;
use std::io;
use std::sync::Arc;

/// Whether a connection failed because the server's certificate is none to be trusted, for this host and today.
pub(super) fn is_certificate_refused(error: &(dyn Error + 'static)) -> bool {
    if let Some(error) = error.downcast_ref::<rustls::Error>() {
        return matches!(error, rustls::Error::InvalidCertificate(_));
    }
    inside(error)
        .or_else(|| error.source())
        .is_some_and(is_certificate_refused)
}

/// What an error was made of, where its source is not that but what caused that.
fn inside<'e>(error: &'e (dyn Error + 'static)) -> Option<&'e (dyn Error + 'static)> {
    if let Some(shared) = error.downcast_ref::<Arc<dyn Error + Send + Sync>>() {
        return Some(&**shared);
    }
    let inside = error.downcast_ref::<io::Error>()?.get_ref()?;
    Some(inside)
}

/// Without a choice of the process, and where several features of rustls leave one open, rustls would panic.
#[cfg(feature = "redis-rustls")]
pub(super) fn choose_provider() {
    if rustls::crypto::CryptoProvider::get_default().is_none() {
        // Somebody else may have been first.
        drop(rustls::crypto::ring::default_provider().install_default());
    }
}
