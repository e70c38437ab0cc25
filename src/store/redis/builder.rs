//! Configuration of a store, and the connection to its server.

use std::sync::Arc;
use std::time::Duration;

use redis::aio::{ConnectionManager, ConnectionManagerConfig};
use redis::cluster_async::ClusterConnection;
use redis::io::tcp::TcpSettings;
use redis::{Client, IntoConnectionInfo, ProtocolVersion, PushInfo, PushKind};
use tokio::runtime::Handle;

use super::check::Checks;
use super::connection::{Connection, Replication};
use super::managed::{self, CONNECTION_TIMEOUT, Managed};
use super::operations::Server;
use super::watch::Watches;
use super::{RedisStore, failure};
use crate::error::Error;

/// Builder of a [`RedisStore`]. See there for the defaults.
#[derive(Clone, Debug)]
pub struct RedisStoreBuilder {
    prefix: String,
    response_timeout: Duration,
    replication: Option<Replication>,
}

impl RedisStoreBuilder {
    pub(super) fn new() -> Self {
        Self {
            prefix: "idempotency:".to_owned(),
            response_timeout: Duration::from_millis(500),
            replication: None,
        }
    }

    /// Sets the prefix of every key. 64 hexadecimal digits follow it. Default: `idempotency:`.
    ///
    /// Applications that share a server must differ in this prefix, or in the layer's namespace.
    /// For a Cluster, use no braces: a hash tag would put all records on one node.
    #[must_use]
    pub fn with_prefix(mut self, prefix: impl Into<String>) -> Self {
        self.prefix = prefix.into();
        self
    }

    /// Sets how long the server may take to reply. Must be more than zero. Default: 500 ms. The
    /// time includes a new connection if the old one broke.
    #[must_use]
    pub fn with_response_timeout(mut self, timeout: Duration) -> Self {
        self.response_timeout = timeout;
        self
    }

    /// Sets how many replicas must acknowledge each claim and each outcome, and how long they have
    /// for it. `timeout` must be more than zero. Default: no wait for replicas.
    ///
    /// If too few replicas acknowledge a claim, the store releases the claim, and the claim fails,
    /// so that no handler runs whose record a failover would lose. If too few acknowledge an
    /// outcome, the completion fails, and the layer repeats it. Both fail with
    /// [`StoreUnavailable`](crate::ErrorKind::StoreUnavailable).
    ///
    /// While the server waits, it replies to nothing else on the connection, so a missing replica
    /// slows all operations. Keep `timeout` short. An operation may take the response timeout and
    /// twice this `timeout`. This is no consensus: a replica that lacks the write can still be
    /// promoted.
    #[must_use]
    pub const fn with_replication(mut self, replicas: usize, timeout: Duration) -> Self {
        self.replication = Some(Replication { replicas, timeout });
        self
    }

    /// Connects to `redis://[user:password@]host[:port][/database]`.
    ///
    /// `rediss://` uses TLS, and needs the feature `redis-rustls` or a TLS feature of `redis`. The
    /// store then trusts the authorities of the system. For another authority, make a client
    /// (`redis::Client::build_with_tls`) and use [`connect_client`](Self::connect_client).
    ///
    /// # Errors
    ///
    /// [`Configuration`](crate::ErrorKind::Configuration) if the URL or a setting is invalid, the
    /// server refuses the credentials, is older than 7.0, is a replica or may evict records, or the
    /// user lacks a right. [`StoreUnavailable`](crate::ErrorKind::StoreUnavailable) if the server
    /// cannot be reached.
    pub async fn connect(self, url: &str) -> Result<RedisStore, Error> {
        let client = Client::open(url).map_err(failure::of_connect)?;
        self.connect_client(client).await
    }

    /// Connects with a client of yours. The store uses the client's address, credentials and TLS
    /// settings, and makes a connection of its own with RESP3 and `TCP_NODELAY`. With TLS by the
    /// feature `redis-rustls`, ring becomes the default cryptography provider of the process if
    /// none was installed before.
    ///
    /// # Errors
    ///
    /// The same as for [`connect`](Self::connect).
    pub async fn connect_client(self, client: Client) -> Result<RedisStore, Error> {
        self.validate()?;
        #[cfg(feature = "redis-rustls")]
        if let redis::ConnectionAddr::TcpTls { .. } = client.get_connection_info().addr() {
            crate::store::tls::choose_provider();
        }
        let client = self.tuned(&client).map_err(failure::of_connect)?;
        let runtime = Handle::try_current().map_err(|_| failure::NO_RUNTIME)?;
        let database = client.get_connection_info().redis_settings().db();
        let logged_in = managed::log_in_once(&client).await;
        logged_in.map_err(|error| failure::of_login(error, database))?;

        let watches = Arc::new(Watches::default());
        let checks = Arc::new(self.checks());
        let (pushed, broken) = (Arc::clone(&watches), Arc::clone(&checks));
        let config = ConnectionManagerConfig::new()
            .set_connection_timeout(Some(CONNECTION_TIMEOUT))
            // Each exchange has its own limit.
            .set_response_timeout(None)
            .set_min_delay(Duration::from_millis(20))
            .set_max_delay(Duration::from_millis(500))
            .set_push_sender(move |push: PushInfo| {
                if push.kind == PushKind::Disconnection {
                    broken.disconnected();
                }
                pushed.pushed(&push);
                Ok::<_, std::convert::Infallible>(())
            });
        let managed = Managed::made(client, config, runtime).map_err(failure::of_connect)?;
        self.build(Connection::Managed(managed), checks, Some(watches)).await
    }

    /// Uses a connection of yours, with its own timeouts and reconnection. Set `tcp_nodelay`.
    ///
    /// The server cannot push to this connection, so [`watch`](crate::Store::watch) never resolves,
    /// and waiters poll.
    ///
    /// A `ConnectionManager` (`redis` 1.8) reconnects after I/O errors only. If the server refuses
    /// the login for longer than the manager's own retries take, for example because an operator
    /// has removed the user, the manager returns that refusal forever. Every operation then fails
    /// until the application makes a new manager and a new store. A store that makes its own
    /// connection ([`connect_client`](Self::connect_client)) logs in again.
    ///
    /// # Errors
    ///
    /// The same as for [`connect`](Self::connect).
    pub async fn use_connection_manager(self, connection: ConnectionManager) -> Result<RedisStore, Error> {
        let checks = Arc::new(self.checks());
        let managed = Managed::of_application(connection);
        self.build(Connection::Managed(managed), checks, None).await
    }

    /// Uses a Redis Cluster, with the connection's own timeouts and retries. Each record has one
    /// key, so every operation goes to one node.
    ///
    /// Build the client with `retries(0)`. The store itself follows a key to another node, and the
    /// layer repeats an operation if a node is gone. The client's own redirection (`redis` 1.8)
    /// starves under load while a slot moves. Keys in that slot then get 503 until the slot has
    /// moved, but none runs twice.
    ///
    /// The nodes cannot push to this connection, so [`watch`](crate::Store::watch) never resolves,
    /// and waiters poll. Never let the connection read from replicas. Its retries are safe: an
    /// operation that arrives twice acts once.
    ///
    /// # Errors
    ///
    /// The same as for [`connect`](Self::connect).
    pub async fn use_cluster(self, connection: ClusterConnection) -> Result<RedisStore, Error> {
        let checks = Arc::new(self.checks());
        self.build(Connection::Cluster(connection), checks, None).await
    }

    fn checks(&self) -> Checks {
        let is_replicated = self.replication.is_some_and(|replication| replication.replicas > 0);
        Checks::new(&self.prefix, is_replicated, self.response_timeout)
    }

    async fn build(
        self,
        connection: Connection,
        checks: Arc<Checks>,
        watches: Option<Arc<Watches>>,
    ) -> Result<RedisStore, Error> {
        self.validate()?;
        checks.check(&connection).await?;
        Ok(RedisStore(Arc::new(Server {
            connection,
            checks,
            prefix: self.prefix,
            response_timeout: self.response_timeout,
            replication: self.replication.filter(|replication| replication.replicas > 0),
            watches,
        })))
    }

    fn validate(&self) -> Result<(), Error> {
        const TIMEOUT: Error = Error::configuration("the response timeout must be more than zero");
        const REPLICATION: Error = Error::configuration("the timeout of the replication must be more than zero");
        if self.response_timeout.is_zero() {
            return Err(TIMEOUT);
        }
        if self
            .replication
            .is_some_and(|replication| replication.timeout.is_zero())
        {
            return Err(REPLICATION);
        }
        Ok(())
    }

    /// Returns the same client with push messages, `TCP_NODELAY`, and a timeout for connections
    /// whose peer is gone.
    fn tuned(&self, client: &Client) -> redis::RedisResult<Client> {
        let info = client.get_connection_info().clone().into_connection_info()?;
        let redis = info.redis_settings().clone().set_protocol(ProtocolVersion::RESP3);
        let tcp = self.tcp(info.tcp_settings().clone().set_nodelay(true));
        Client::open(info.set_redis_settings(redis).set_tcp_settings(tcp))
    }

    /// Closes a connection whose peer acknowledges nothing for this long. TCP itself would try for
    /// a quarter of an hour.
    #[cfg(any(target_os = "android", target_os = "fuchsia", target_os = "linux"))]
    fn tcp(&self, settings: TcpSettings) -> TcpSettings {
        let shortest = self.response_timeout.saturating_mul(4).max(CONNECTION_TIMEOUT);
        settings.set_user_timeout(shortest)
    }

    #[cfg(not(any(target_os = "android", target_os = "fuchsia", target_os = "linux")))]
    #[expect(clippy::unused_self, reason = "on other systems it uses the settings")]
    fn tcp(&self, settings: TcpSettings) -> TcpSettings {
        settings
    }
}
