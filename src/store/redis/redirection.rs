//! Redirections to another node of a Cluster.

use redis::cluster_async::ClusterConnection;
use redis::cluster_routing::SingleNodeRoutingInfo;
use redis::{Cmd, ErrorKind, RedisError, ServerErrorKind, Value};

/// How often the store follows a redirection in one operation. A slot that moves takes one, or two
/// if it has moved meanwhile.
pub(super) const MOST: usize = 5;

/// The node to which a command must be sent instead.
///
/// The client (1.8) can follow redirections by itself, but it sends ASKING separately from the
/// command that needs it, on a connection that all operations share. If a command of another
/// operation comes between the two, the node refuses both, and under load hardly any operation
/// succeeds while a slot moves.
///
/// Send ASKING only for a command that the server redirected. Otherwise a node that imports the
/// slot would take the key for absent, and would grant a key that the old node has already granted
/// (I1).
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

    /// Sends the commands to that node, without any other command between them.
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

#[cfg(test)]
mod tests {
    use super::super::failure::tests::of_server;
    use super::*;

    #[test]
    fn a_redirection_leads_to_the_named_node_and_no_other_error_does() {
        for (reply, asks, node) in [
            ("MOVED 3999 127.0.0.1:6381", false, ("127.0.0.1", 6381)),
            ("ASK 3999 127.0.0.1:6382", true, ("127.0.0.1", 6382)),
            ("MOVED 3999 ::1:6383", false, ("::1", 6383)),
        ] {
            let redirection = Redirection::of(&of_server(reply)).unwrap();
            assert_eq!(redirection.is_asking, asks, "{reply}");
            let SingleNodeRoutingInfo::ByAddress { host, port } = redirection.to else {
                panic!("{reply}")
            };
            assert_eq!((host.as_str(), port), node, "{reply}");
        }
        for reply in [
            "TRYAGAIN Multiple keys request",
            "CLUSTERDOWN The cluster is down",
            "MOVED 3999 node",
        ] {
            assert!(Redirection::of(&of_server(reply)).is_none(), "{reply}");
        }
    }
}
