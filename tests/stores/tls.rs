//! Stores over TLS, with certificates that the tests make.

use std::error::Error as _;
use std::net::TcpListener;
use std::time::Duration;

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair};
use redis::TlsCertificates;
use tower_idempotency::protocol::{
    Claim, Completion, Decision, Fingerprint, IfLost, Nonce, Outcome, StorageKey, StoredResponse,
};
use tower_idempotency::{BoxStore, Error, ErrorKind, PostgresStore, RedisStore, Store};

use crate::support::postgres::PostgresServer;
use crate::support::redis::RedisServer;

const HOUR: Duration = Duration::from_secs(3_600);
const HERE: &str = "127.0.0.1";

/// An authority that signs certificates. Only a client that is configured for it trusts it.
struct Authority(CertifiedIssuer<'static, KeyPair>);

impl Authority {
    fn new() -> Self {
        let mut about = CertificateParams::new([]).unwrap();
        let name = format!("authority {}", rand::random::<u64>());
        about.distinguished_name.push(DnType::CommonName, name);
        about.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        Self(CertifiedIssuer::self_signed(about, KeyPair::generate().unwrap()).unwrap())
    }

    fn pem(&self) -> String {
        self.0.pem()
    }

    /// Returns a certificate for a host, and its key.
    fn certify(&self, host: &str) -> [String; 2] {
        let key = KeyPair::generate().unwrap();
        let about = CertificateParams::new([host.to_owned()]).unwrap();
        [about.signed_by(&key, &self.0).unwrap().pem(), key.serialize_pem()]
    }
}

/// Claims a key and completes it, through its whole life.
async fn works(store: &impl Store) {
    let claim = |nonce| Claim {
        key: StorageKey::from_bytes([1; 32]),
        fingerprint: Fingerprint::of(b"pay"),
        nonce: Nonce::from_bytes([nonce; 16]),
        lease: HOUR,
        retention: HOUR,
        if_lost: IfLost::Refuse,
        max_attempts: 5,
    };
    let first = claim(1);
    let Decision::Execute(grant) = store.claim(&first).await.unwrap() else {
        panic!("not granted")
    };
    let watch = store.watch(&first.key).await.unwrap();
    let paid = StoredResponse {
        head: "head".into(),
        body: vec![7; 100_000].into(),
    };
    let outcome = Outcome::Stored(paid.clone());
    let completion = store.complete(&first.key, grant.owner, &outcome, HOUR);
    assert_eq!(completion.await.unwrap(), Completion::Completed);
    watch.await;
    assert_eq!(store.claim(&claim(2)).await.unwrap(), Decision::Replay(paid));
}

/// Checks that the error names the certificate and shows no secret.
fn assert_refused_for_its_certificate(error: &Error) {
    let cause = error.source().map(ToString::to_string);
    assert_eq!(error.kind(), ErrorKind::Configuration, "{error:?}");
    assert!(error.to_string().contains("certificate"), "{error:?}");
    assert!(!format!("{error:?} {error} {cause:?}").contains("hunter2"), "{error:?}");
}

/// Starts a server with a certificate, and returns its TLS port.
fn redis_with([certificate, key]: [String; 2]) -> (RedisServer, u16) {
    let server = RedisServer::start();
    let client = redis::Client::open(server.url()).unwrap();
    let mut connection = client.get_connection().unwrap();
    let certificate = server.give("certificate.pem", &certificate);
    let key = server.give("key.pem", &key);
    // Another process may take the port between the search for a free one and its use.
    for _ in 0..10 {
        let port = TcpListener::bind((HERE, 0)).unwrap().local_addr().unwrap().port();
        let mut set = redis::cmd("CONFIG");
        set.arg("SET").arg("tls-cert-file").arg(certificate.to_str());
        set.arg("tls-key-file")
            .arg(key.to_str())
            .arg("tls-auth-clients")
            .arg("no");
        set.arg("tls-port").arg(port);
        if set.exec(&mut connection).is_ok() {
            return (server, port);
        }
    }
    panic!("redis-server does not take a certificate")
}

/// Returns a client that trusts only this authority.
fn redis_client(port: u16, authority: &Authority) -> redis::Client {
    let trusted = TlsCertificates {
        client_tls: None,
        root_cert: Some(authority.pem().into_bytes()),
    };
    redis::Client::build_with_tls(format!("rediss://:hunter2@{HERE}:{port}"), trusted).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn redis_is_reached_over_tls_with_the_settings_of_the_applications_client() {
    let authority = Authority::new();
    let (server, port) = redis_with(authority.certify(HERE));
    server.command::<()>("CONFIG SET requirepass hunter2");
    let store = RedisStore::from_client(redis_client(port, &authority)).await.unwrap();
    works(&store).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn redis_with_a_certificate_of_an_untrusted_authority_is_refused() {
    let authority = Authority::new();
    let (_server, port) = redis_with(authority.certify(HERE));
    let untrusted = RedisStore::from_client(redis_client(port, &Authority::new())).await;
    assert_refused_for_its_certificate(&untrusted.unwrap_err());
    // The system does not trust this authority either.
    let url = format!("rediss://:hunter2@{HERE}:{port}");
    assert_refused_for_its_certificate(&RedisStore::connect(&url).await.unwrap_err());
    assert_refused_for_its_certificate(&BoxStore::from_url(&url).await.unwrap_err());
}

#[tokio::test(flavor = "multi_thread")]
async fn redis_with_a_certificate_for_another_host_is_refused() {
    let authority = Authority::new();
    let (_server, port) = redis_with(authority.certify("elsewhere.test"));
    let elsewhere = RedisStore::from_client(redis_client(port, &authority)).await;
    assert_refused_for_its_certificate(&elsewhere.unwrap_err());
}

#[tokio::test(flavor = "multi_thread")]
async fn redis_without_tls_is_refused_by_a_tls_client() {
    let server = RedisServer::start();
    let plain = RedisStore::from_client(redis_client(server.port(), &Authority::new())).await;
    assert_eq!(plain.unwrap_err().kind(), ErrorKind::StoreUnavailable);
}

/// Starts a server with a certificate.
async fn postgres_with([certificate, key]: [String; 2]) -> PostgresServer {
    let server = PostgresServer::start();
    let certificate = server.give("certificate.pem", &certificate);
    let key = server.give("key.pem", &key);
    let pool = sqlx::PgPool::connect(&server.url()).await.unwrap();
    for setting in [
        format!("ssl_cert_file = '{}'", certificate.display()),
        format!("ssl_key_file = '{}'", key.display()),
        "ssl = on".to_owned(),
    ] {
        let set = sqlx::query(sqlx::AssertSqlSafe(format!("ALTER SYSTEM SET {setting}")));
        set.execute(&pool).await.unwrap();
    }
    sqlx::query("SELECT pg_reload_conf()").execute(&pool).await.unwrap();
    // The main process of the server passes the settings that it has read to each new connection.
    let is_on = async || -> String {
        let pool = sqlx::PgPool::connect(&server.url()).await.unwrap();
        sqlx::query_scalar("SHOW ssl").fetch_one(&pool).await.unwrap()
    };
    while is_on().await != "on" {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    server
}

/// Returns a URL that trusts only `authority`.
fn postgres_url(server: &PostgresServer, mode: &str, authority: &Authority) -> String {
    let root = server.give(&format!("root-{}.pem", rand::random::<u64>()), &authority.pem());
    let url = server.url().replace("app@", "app:hunter2@");
    format!("{url}?sslmode={mode}&sslrootcert={}", root.display())
}

async fn is_encrypted(store: &PostgresStore) -> bool {
    let asked = sqlx::query_scalar("SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()");
    asked.fetch_one(store.pool()).await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn postgres_is_reached_over_tls() {
    let authority = Authority::new();
    let server = postgres_with(authority.certify(HERE)).await;
    let verified = postgres_url(&server, "verify-full", &authority);
    let store = PostgresStore::connect(&verified).await.unwrap();
    assert!(is_encrypted(&store).await);
    works(&store).await;
    BoxStore::from_url(&verified).await.unwrap();
    // This mode does not check the authority.
    let required = format!("{}?sslmode=require", server.url());
    assert!(is_encrypted(&PostgresStore::connect(&required).await.unwrap()).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn postgres_with_a_certificate_of_an_untrusted_authority_is_refused() {
    let server = postgres_with(Authority::new().certify(HERE)).await;
    for mode in ["verify-ca", "verify-full"] {
        let url = postgres_url(&server, mode, &Authority::new());
        assert_refused_for_its_certificate(&PostgresStore::connect(&url).await.unwrap_err());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn postgres_with_a_certificate_for_another_host_is_refused_where_hosts_are_verified() {
    let authority = Authority::new();
    let server = postgres_with(authority.certify("elsewhere.test")).await;
    let url = postgres_url(&server, "verify-full", &authority);
    assert_refused_for_its_certificate(&PostgresStore::connect(&url).await.unwrap_err());
    let url = postgres_url(&server, "verify-ca", &authority);
    assert!(is_encrypted(&PostgresStore::connect(&url).await.unwrap()).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn postgres_without_tls_is_refused_where_tls_is_required() {
    let server = PostgresServer::start();
    let required = format!("{}?sslmode=require", server.url());
    let error = PostgresStore::connect(&required).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Configuration);
    assert!(error.to_string().contains("TLS"), "{error}");
}
