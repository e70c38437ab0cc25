//! Recognises streams by the heads of their responses.

use http::{header, response};

/// Media types whose responses are streams. They may not end, or their readers need each part at
/// once.
const KNOWN: [&str; 7] = [
    // HTML Living Standard, section 9.2.
    "text/event-stream",
    // JSON with one value on each line.
    "application/x-ndjson",
    "application/ndjson",
    "application/jsonl",
    // RFC 7464.
    "application/json-seq",
    "application/stream+json",
    // Each part replaces the part before it, for example the images of a camera.
    "multipart/x-mixed-replace",
];

/// The media types whose responses count as streams. Default: [`KNOWN`].
#[derive(Clone, Debug, Default)]
pub(crate) struct StreamTypes(Option<Vec<String>>);

impl StreamTypes {
    pub(crate) fn new(types: impl IntoIterator<Item = impl Into<String>>) -> Self {
        let types = types.into_iter().map(|media_type| {
            let media_type: String = media_type.into();
            let essence = media_type.split(';').next().unwrap_or_default();
            essence.trim().to_owned()
        });
        Self(Some(types.collect()))
    }

    /// Returns whether a response is a stream. It is one by its media type, or because the
    /// connection stops speaking HTTP (101).
    pub(crate) fn include(&self, response: &response::Parts) -> bool {
        match &self.0 {
            None => is_stream(response),
            Some(types) => response.status.is_informational() || has_type(response, types),
        }
    }
}

/// Returns whether a response is a stream by the [`KNOWN`] types.
pub(crate) fn is_stream(response: &response::Parts) -> bool {
    response.status.is_informational() || has_type(response, &KNOWN)
}

/// Returns whether the media type of a response is one of `types`, without regard to its
/// parameters.
fn has_type(response: &response::Parts, types: &[impl AsRef<str>]) -> bool {
    response.headers.get(header::CONTENT_TYPE).is_some_and(|value| {
        let essence = value.as_bytes().split(|byte| *byte == b';').next().unwrap_or_default();
        let essence = essence.trim_ascii();
        types
            .iter()
            .any(|known| essence.eq_ignore_ascii_case(known.as_ref().as_bytes()))
    })
}

#[cfg(test)]
mod tests {
    use http::Response;

    use super::*;

    fn is_stream(types: &StreamTypes, status: u16, content_type: &str) -> bool {
        let response = Response::builder().status(status).header("content-type", content_type);
        types.include(&response.body(()).unwrap().into_parts().0)
    }

    #[test]
    fn known_types_and_upgrades_are_streams_in_any_spelling() {
        let types = StreamTypes::default();
        for known in KNOWN {
            assert!(is_stream(&types, 200, known), "{known}");
            assert!(
                is_stream(&types, 200, &format!("{}; charset=utf-8", known.to_uppercase())),
                "{known}"
            );
        }
        assert!(is_stream(&types, 101, "text/plain"));
        for other in [
            "text/plain",
            "application/json",
            "text/event-streams",
            "x; text/event-stream",
            "",
        ] {
            assert!(!is_stream(&types, 200, other), "{other}");
        }
    }

    #[test]
    fn an_own_list_replaces_the_known_types() {
        let types = StreamTypes::new([" Application/X-Rows; charset=utf-8"]);
        assert!(is_stream(&types, 200, "application/x-rows"));
        assert!(!is_stream(&types, 200, "text/event-stream"));
    }
}
