//! TLS by rustls, where a feature enables it.

use std::error::Error;
use std::io;
use std::sync::Arc;

/// Whether a connection failed because the server's certificate is not trusted, for this host and
/// at this time.
pub(super) fn is_certificate_refused(error: &(dyn Error + 'static)) -> bool {
    if let Some(error) = error.downcast_ref::<rustls::Error>() {
        return matches!(error, rustls::Error::InvalidCertificate(_));
    }
    inside(error)
        .or_else(|| error.source())
        .is_some_and(is_certificate_refused)
}

/// Returns the error inside a wrapper whose `source` is not that error but the cause of that error.
fn inside<'e>(error: &'e (dyn Error + 'static)) -> Option<&'e (dyn Error + 'static)> {
    if let Some(shared) = error.downcast_ref::<Arc<dyn Error + Send + Sync>>() {
        return Some(&**shared);
    }
    let inside = error.downcast_ref::<io::Error>()?.get_ref()?;
    Some(inside)
}

/// Installs ring as the provider of cryptography if the process has none. rustls would panic if its
/// features allow several providers and the process has chosen none.
#[cfg(feature = "redis-rustls")]
pub(super) fn choose_provider() {
    if rustls::crypto::CryptoProvider::get_default().is_none() {
        // Another thread may have been first.
        drop(rustls::crypto::ring::default_provider().install_default());
    }
}
