use super::*;
use crate::error::ErrorKind;

async fn refusal(url: &str) -> String {
    let error = BoxStore::from_url(url).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Configuration, "{url}");
    assert!(std::error::Error::source(&error).is_none());
    error.to_string()
}

#[tokio::test]
async fn memory_needs_no_feature_and_its_scheme_no_case() {
    for url in ["memory:", "memory://", "MEMORY:"] {
        let store = BoxStore::from_url(url).await.unwrap();
        assert!(store.innermost().is::<MemoryStore>(), "{url}");
    }
}

#[tokio::test]
async fn a_url_with_an_unknown_scheme_is_refused_with_the_known_ones() {
    let urls = [
        "",
        "memory",
        "memory:?records=7",
        "redis",
        "redis:6379",
        "postgres:/var/run",
        "mysql://db",
        "://",
    ];
    for url in urls {
        let message = refusal(url).await;
        for scheme in ["memory:", "redis://", "rediss://", "postgres://", "postgresql://"] {
            assert!(message.contains(scheme), "{url}: {message}");
        }
    }
}

#[cfg(not(feature = "redis"))]
#[tokio::test]
async fn redis_without_its_feature_names_the_feature() {
    for url in ["redis://localhost", "rediss://localhost", "Redis://localhost"] {
        let message = refusal(url).await;
        assert!(message.contains("feature `redis`"), "{message}");
    }
}

#[cfg(not(feature = "postgres"))]
#[tokio::test]
async fn postgres_without_its_feature_names_the_feature() {
    for url in ["postgres://localhost/db", "postgresql://localhost/db"] {
        let message = refusal(url).await;
        assert!(message.contains("feature `postgres`"), "{message}");
    }
}

#[tokio::test]
async fn an_error_holds_nothing_of_the_url() {
    for url in ["mongodb://app:hunter2@db", "hunter2", "memory:hunter2"] {
        let error = BoxStore::from_url(url).await.unwrap_err();
        assert!(!format!("{error} {error:?}").contains("hunter2"));
    }
}

#[test]
fn the_innermost_store_is_found_at_any_depth() {
    fn is_found(store: &impl Store) -> bool {
        store.innermost().is::<MemoryStore>()
    }
    let shared = Arc::new(Arc::new(MemoryStore::new()));
    let boxed = BoxStore::new(Arc::clone(&shared));
    let deep = BoxStore::new(BoxStore::new(Arc::new(boxed.clone())));
    assert!(is_found(&MemoryStore::new()) && is_found(&shared));
    assert!(is_found(&boxed) && is_found(&deep) && is_found(&Arc::new(deep)));
}

#[test]
fn debug_output_names_the_inner_store() {
    let shown = format!("{:?}", BoxStore::new(MemoryStore::new()));
    assert!(
        shown.starts_with("BoxStore(") && shown.contains("MemoryStore"),
        "{shown}"
    );
}
