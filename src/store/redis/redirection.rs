//! Where a node of a Cluster says that a key lies on another one.

use redis::cluster_async::ClusterConnection;
use redis::cluster_routing::SingleNodeRoutingInfo;
use redis::{Cmd, ErrorKind, RedisError, ServerErrorKind, Value};

/// How often one operation is sent on. A slot that moves takes one, or two where it has moved meanwhile.
pub(super) const MOST: usize = 5;

/// The node that a command is to be sent to instead.
///
/// The client (1.8) can follow by itself, but it sends ASKING apart from the command that it is for, on a connection that all share:
/// where another one's command comes between, both are turned away, and under load hardly anybody gets through while a slot
/// moves. Never may ASKING go ahead of a command that nobody was sent on with: a node that imports the slot would take the
/// key for absent, and grant what the node that still has it has granted.
pub(super) struct Redirection {
    to: SingleNodeRoutingInfo,
    is_asking: bool,
}

impl Redirection {
    pub(super) fn of(error: &RedisError) -> Option<Self> {
        let is_asking = match error.kind() {
            ErrorKind::Server(ServerErrorKind::Ask) => true,
            ErrorKind::Server(ServerErrorKind::Moved) => false,
            _ => return None,
        };
        let (address, _slot) = error.redirect_node()?;
        let (host, port) = address.rsplit_once(':')?;
        let (host, port) = (host.to_owned(), port.parse().ok()?);
        let to = SingleNodeRoutingInfo::ByAddress { host, port };
        Some(Self { to, is_asking })
    }

    /// Sends the commands there, with nothing between them.
    pub(super) async fn follow(
        self,
        connection: &mut ClusterConnection,
        commands: &[&Cmd],
    ) -> Result<Vec<Value>, RedisError> {
        let mut pipeline = redis::pipe();
        if self.is_asking {
            pipeline.cmd("ASKING");
        }
        for command in commands {
            pipeline.add_command((*command).clone());
        }
        let first = usize::from(self.is_asking);
        let mut values = connection
            .route_pipeline(pipeline, 0, first + commands.len(), self.to)
            .await?;
        Ok(values.split_off(first.min(values.len())))
    }
}
