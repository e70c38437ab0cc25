//! The queue, as its producer uses it.

use std::fmt;
use std::time::Duration;

use apalis::prelude::TaskSink;
use apalis_redis::RedisStorage;
use harness::RedisServer;

use crate::{Charge, Error, config};

/// The queue, as its producer uses it.
pub struct Queue<'r> {
    redis: &'r RedisServer,
    storage: RedisStorage<Charge>,
    pushed: usize,
}

impl<'r> Queue<'r> {
    /// Opens the queue in this Redis.
    ///
    /// # Errors
    ///
    /// Fails if apalis cannot connect.
    pub async fn open(redis: &'r RedisServer) -> Result<Self, Error> {
        let connection = apalis_redis::connect(redis.url()).await?;
        Ok(Self {
            redis,
            storage: RedisStorage::new(connection).with_config(config()),
            pushed: 0,
        })
    }

    /// Enqueues a job for an order.
    ///
    /// # Errors
    ///
    /// Fails if apalis cannot enqueue the job.
    pub async fn push(&mut self, order: &str) -> Result<(), Error> {
        let order = order.to_owned();
        self.storage.push(Charge { order }).await?;
        self.pushed += 1;
        Ok(())
    }

    /// Returns the number of tasks that have ended, done or dead.
    #[must_use]
    pub fn ended(&self) -> usize {
        let config = config();
        [config.done_jobs_set(), config.dead_jobs_set()]
            .iter()
            .map(|set| self.redis.command::<usize>(&format!("SCARD {set}")))
            .sum()
    }

    /// Waits until all tasks have ended.
    ///
    /// # Errors
    ///
    /// Fails if this takes more than two minutes.
    pub async fn until_ended(&self) -> Result<(), Error> {
        for _ in 0..600 {
            if self.ended() >= self.pushed {
                return Ok(());
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
        Err(format!(
            "only {} of {} tasks ended within two minutes",
            self.ended(),
            self.pushed
        )
        .into())
    }

    /// Returns the orders of the dead tasks.
    ///
    /// # Errors
    ///
    /// Fails if a task cannot be read.
    pub fn dead(&self) -> Result<Vec<String>, Error> {
        let config = config();
        let mut orders = Vec::new();
        for id in self
            .redis
            .command::<Vec<String>>(&format!("SMEMBERS {}", config.dead_jobs_set()))
        {
            let job = self
                .redis
                .command::<Vec<u8>>(&format!("HGET {} {id}", config.job_data_hash()));
            orders.push(serde_json::from_slice::<Charge>(&job)?.order);
        }
        Ok(orders)
    }
}

impl fmt::Debug for Queue<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Queue")
            .field("pushed", &self.pushed)
            .finish_non_exhaustive()
    }
}
