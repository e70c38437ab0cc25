//! The connection that the operations of a store share, and the login that replaces it.

use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use redis::aio::{ConnectionManager, ConnectionManagerConfig};
use redis::{AsyncConnectionConfig, Client, RedisError, RedisResult, cmd};
use tokio::runtime::Handle;
use tokio::sync::Mutex;

use crate::clock::{Clock, Timestamp, within};

/// The longest time to make a connection.
pub(super) const CONNECTION_TIMEOUT: Duration = Duration::from_secs(2);

/// The time between two logins. The server counts refused logins, and some operators lock users out
/// by that count.
const PAUSE: Duration = Duration::from_secs(1);

/// A connection to one server.
///
/// `ConnectionManager` (`redis` 1.8) reconnects after I/O errors only. If the server replies to the
/// login with an error until the manager's attempts are used up (1.5 s), the manager returns that
/// error forever. Examples are a user who was removed for a while, and a database that the user may
/// not select. The store replaces such a manager if the store has made it. The store cannot replace
/// a manager of the application, because the manager does not show its client.
pub(super) struct Managed {
    manager: RwLock<ConnectionManager>,
    login: Option<Login>,
}

/// The parameters of a new manager.
struct Login {
    client: Client,
    config: ConnectionManagerConfig,
    /// The runtime on which the store lives.
    runtime: Handle,
    clock: Clock,
    /// The time before which the store does not log in again. It is locked during a login.
    next: Arc<Mutex<Timestamp>>,
}

impl Managed {
    /// Wraps a manager of the application.
    pub(super) fn of_application(manager: ConnectionManager) -> Arc<Self> {
        Arc::new(Self {
            manager: RwLock::new(manager),
            login: None,
        })
    }

    /// Makes a manager, which connects at its first use.
    pub(super) fn made(client: Client, config: ConnectionManagerConfig, runtime: Handle) -> RedisResult<Arc<Self>> {
        let manager = ConnectionManager::new_lazy_with_config(client.clone(), config.clone())?;
        Ok(Arc::new(Self {
            manager: RwLock::new(manager),
            login: Some(Login {
                client,
                config,
                runtime,
                clock: Clock::system(),
                next: Arc::default(),
            }),
        }))
    }

    pub(super) fn manager(&self) -> ConnectionManager {
        self.manager.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Logs in again after the server refused the login of the manager, and replaces the manager.
    ///
    /// # Errors
    ///
    /// The error of the new login. If there is no new login, `refusal`: the last login is less than
    /// a second old or still runs, or the application has made the manager.
    pub(super) async fn log_in_again(self: &Arc<Self>, refusal: RedisError) -> RedisResult<()> {
        let Some(login) = &self.login else {
            return Err(refusal);
        };
        let mut next = match Arc::clone(&login.next).try_lock_owned() {
            Ok(next) if *next <= login.clock.now() => next,
            _ => return Err(refusal),
        };
        let managed = Arc::clone(self);
        // Log in from a task, because the operation that waits for the login has less time than a
        // login may take.
        let task = login.runtime.spawn(async move {
            let Some(login) = &managed.login else {
                return Ok(());
            };
            let made = login.make().await;
            *next = login.clock.now().saturating_add(PAUSE);
            *managed.manager.write().unwrap_or_else(PoisonError::into_inner) = made?;
            Ok(())
        });
        task.await.unwrap_or(Err(refusal))
    }
}

impl Login {
    /// Logs in once, and makes a manager unless the server refuses the login. The manager recovers
    /// from I/O errors by itself.
    async fn make(&self) -> RedisResult<ConnectionManager> {
        let tried = log_in_once(&self.client).await;
        if let Err(refusal) = &tried {
            if !refusal.is_io_error() {
                return Err(refusal.clone());
            }
        }
        let mut manager = ConnectionManager::new_lazy_with_config(self.client.clone(), self.config.clone())?;
        if tried.is_ok() {
            // This command makes the manager connect. The reply does not matter, and the manager
            // connects later if there is no reply in time.
            drop(within(CONNECTION_TIMEOUT, manager.send_packed_command(&cmd("TIME"))).await);
        }
        Ok(manager)
    }
}

/// Makes one connection, and closes it. A manager would try a wrong password seven times.
pub(super) async fn log_in_once(client: &Client) -> RedisResult<()> {
    let config = AsyncConnectionConfig::new().set_connection_timeout(Some(CONNECTION_TIMEOUT));
    let connected = client.get_multiplexed_async_connection_with_config(&config).await;
    connected.map(drop)
}
