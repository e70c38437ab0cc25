//! The client in Python checks each claim against the server, and the server counts the charges.

use grpc::{Bank, idempotency, no_idempotency, run_client, serve};

const CLAIMS: [&str; 8] = [
    "duplicates get the first receipt",
    "another request under the key is refused",
    "a failure in the header",
    "a failure in the trailers",
    "a deadline that expires",
    "compression",
    "streams",
    "duplicates at the same time",
];

#[tokio::test(flavor = "multi_thread")]
async fn a_client_in_python_finds_every_promise_kept() {
    let bank = Bank::default();
    let server = serve(idempotency(), bank.clone()).await.unwrap();
    let run = tokio::task::spawn_blocking(move || run_client(server).unwrap());
    let (output, is_as_promised) = run.await.unwrap();
    assert!(is_as_promised, "{output}");
    for claim in CLAIMS {
        assert!(output.contains(&format!("ok: {claim}")), "{claim}: {output}");
    }
    for (account, charges) in [
        ("alice", 1),
        ("blocked", 1),
        ("unreachable", 2),
        ("closed", 2),
        ("slow", 1),
        ("busy", 1),
    ] {
        assert_eq!(bank.charges(account), charges, "{account}");
    }
}

/// Shows that the client can fail: without the layer, every claim is false.
#[tokio::test(flavor = "multi_thread")]
async fn the_client_notices_a_server_without_the_layer() {
    let server = serve(no_idempotency(), Bank::default()).await.unwrap();
    let run = tokio::task::spawn_blocking(move || run_client(server).unwrap());
    let (output, is_as_promised) = run.await.unwrap();
    assert!(!is_as_promised, "{output}");
    for claim in CLAIMS {
        assert!(output.contains(&format!("FAILED: {claim}")), "{claim}: {output}");
    }
}
