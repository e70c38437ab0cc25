//! Several processes over one PostgreSQL: shared keys, kills, zombies.

use crate::cluster::Mode;
use crate::scenarios;
use crate::support::postgres::PostgresServer;

#[tokio::test(flavor = "multi_thread")]
async fn two_and_four_processes_execute_each_key_once() {
    for processes in [2, 4] {
        let server = PostgresServer::start();
        scenarios::shared_keys(&server.url(), processes).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn kills_never_make_an_effect_twice_where_lost_keys_are_refused() {
    let server = PostgresServer::start();
    scenarios::kills(&server.url(), Mode::Refuse).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn kills_are_taken_over_where_lost_keys_are_executed() {
    let server = PostgresServer::start();
    scenarios::kills(&server.url(), Mode::Execute).await;
}

/// Each process has one connection, for its claims, completions, renewals and waiters.
#[tokio::test(flavor = "multi_thread")]
async fn kills_never_make_an_effect_twice_over_a_pool_of_one_connection() {
    let server = PostgresServer::start();
    scenarios::kills(&format!("{}#one", server.url()), Mode::Refuse).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn kills_leave_exactly_one_effect_where_it_shares_the_transaction_of_its_response() {
    let server = PostgresServer::start();
    kills_in_transactions(&server, "").await;
}

/// The transactions of the handler are serializable, and so are the statements of the store,
/// because the store does not change the sessions of this pool.
#[tokio::test(flavor = "multi_thread")]
async fn kills_leave_exactly_one_effect_where_the_role_is_serializable() {
    let server = PostgresServer::start();
    let pool = sqlx::PgPool::connect(&server.url()).await.unwrap();
    let set = sqlx::query("ALTER ROLE app SET default_transaction_isolation = 'serializable'");
    set.execute(&pool).await.unwrap();
    kills_in_transactions(&server, "#one").await;
}

async fn kills_in_transactions(server: &PostgresServer, fragment: &str) {
    let pool = sqlx::PgPool::connect(&server.url()).await.unwrap();
    let create = sqlx::query("CREATE TABLE payments (id bigserial PRIMARY KEY, note text NOT NULL)");
    create.execute(&pool).await.unwrap();
    let keys = scenarios::kills(&format!("{}{fragment}", server.url()), Mode::Transaction).await;
    let counts: Vec<(String, i64)> = {
        let rows = sqlx::query_as("SELECT note, count(*) FROM payments GROUP BY note");
        rows.fetch_all(&pool).await.unwrap()
    };
    assert_eq!(counts.len(), keys);
    assert!(counts.iter().all(|(_, count)| *count == 1), "{counts:?}");
}

/// Without its renewals, another process would take over an execution that takes longer than its
/// lease.
#[tokio::test(flavor = "multi_thread")]
async fn kills_never_repeat_a_live_execution_where_the_blocking_pools_are_full() {
    let server = PostgresServer::start();
    scenarios::kills(&server.url(), Mode::FullPool).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_zombie_changes_nothing_and_its_callers_get_the_winners_bytes() {
    let server = PostgresServer::start();
    scenarios::zombies(&server.url()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unknown_outcome_is_healed_by_a_late_completion() {
    let server = PostgresServer::start();
    scenarios::late_completions(&server.url()).await;
}
