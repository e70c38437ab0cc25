//! One script on a server that was checked.

use std::sync::Arc;
use std::time::Duration;

use futures::future::BoxFuture;
use redis::{Cmd, RedisError, Value};

use super::check::Checks;
use super::connection::{Connection, Exchanged, Failed, Replication};
use super::failure;
use super::scripts::{Reply, Script};
use crate::clock::within;

/// The reason why a script has no result.
enum CallError {
    /// The server must not be used, or its check failed.
    Unchecked(Failed),
    /// The server did not run the script to its end, or did not reply.
    Failed(RedisError),
}

impl Connection {
    /// Runs a script on a server that was [checked](Checks). This takes one round trip, or more if
    /// the server does not know the script.
    pub(super) async fn run(
        mut self,
        checks: Arc<Checks>,
        script: &'static Script,
        key: Vec<u8>,
        by_digest: Cmd,
        replication: Option<Replication>,
        limit: Duration,
    ) -> Exchanged {
        // If the server does not know the script, it waits for replicas twice, the first time
        // without a write.
        let waiting = replication.map_or(Duration::ZERO, |replication| replication.timeout.saturating_mul(2));
        let limit = limit.saturating_add(waiting);
        let exchange = async {
            let mut epoch = match checks.passed() {
                Some(epoch) => epoch,
                None => self.check(&checks).await?,
            };
            let mut reply = self.call(&checks, &mut epoch, script, &by_digest, replication).await;
            if let (Err(CallError::Failed(refusal)), Some(instead)) = (&reply, script.instead()) {
                if failure::is_of_refused_writes(refusal) {
                    let by_digest = instead.by_digest_with(&by_digest);
                    let calling = self.call(&checks, &mut epoch, instead, &by_digest, replication);
                    reply = Box::pin(calling).await;
                }
            }
            match reply {
                Ok(reply) if checks.stands(epoch) => Ok(reply),
                // The connection broke meanwhile, so the reply may come from the new connection,
                // whose server was not checked. If that server must not be used, the fate of the
                // operation is unknown, and the next operation finds the reason.
                Ok(reply) => match self.check(&checks).await {
                    Ok(_) => Ok(reply),
                    Err(_) => Err(Failed::Other(failure::CHANGED)),
                },
                Err(CallError::Unchecked(failed)) => Err(failed),
                Err(CallError::Failed(error)) => {
                    // Do not do this for a Cluster: its nodes redirect to the new primary, and a
                    // node that is down would expire the check all the time.
                    if matches!(self, Self::Managed(_)) && failure::is_of_changed_server(&error) {
                        checks.expire(epoch);
                    }
                    Err(self.failed(error))
                }
            }
        };
        match within(limit, exchange).await {
            Ok(Ok((value, is_replicated))) => Exchanged {
                reply: Reply::of(value, &key).map_err(Failed::Other),
                is_replicated,
            },
            Ok(Err(failed)) => Exchanged::failed(failed),
            Err(_) => Exchanged::failed(Failed::Other(failure::TIMED_OUT)),
        }
    }

    /// Runs a script by its digest, or from its source if the server does not know the digest.
    async fn call(
        &mut self,
        checks: &Checks,
        epoch: &mut u64,
        script: &Script,
        by_digest: &Cmd,
        replication: Option<Replication>,
    ) -> Result<(Value, bool), CallError> {
        let reply = self.send(by_digest, replication).await;
        if !reply.as_ref().is_err_and(failure::is_unknown_script) {
            return reply.map_err(CallError::Failed);
        }
        // The script did not run, so it is safe to send it again. The server was restarted, or is
        // another one.
        checks.expire(*epoch);
        *epoch = self.check(checks).await.map_err(CallError::Unchecked)?;
        let sent = Box::pin(self.send(&script.by_source(by_digest), replication)).await;
        sent.map_err(CallError::Failed)
    }

    /// Checks the server. Boxed because few operations run the check, and every operation's future
    /// would otherwise be larger.
    fn check<'a>(&'a self, checks: &'a Checks) -> BoxFuture<'a, Result<u64, Failed>> {
        Box::pin(async { checks.check(self).await.map_err(Failed::Other) })
    }
}
