//! Runs every example as its reader would run it, and checks its claims over HTTP.
//!
//! `cargo test` builds the examples before it runs these tests. `cargo test --test examples` does
//! not build them, so run `cargo build --examples` with the same features first.

use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use bytes::Bytes;
use futures::future::{join, join_all};
use http::{HeaderMap, Request, StatusCode, header};
use http_body_util::{BodyExt, Full};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, BufReader, Lines};
use tokio::process::{Child, ChildStdout, Command};
use tokio::time::timeout;

const PATIENCE: Duration = Duration::from_secs(30);

/// A running example. Dropping the value kills the process, also after a failed assertion.
struct Example {
    child: Child,
    stdout: Lines<BufReader<ChildStdout>>,
    origin: String,
    client: Client<HttpConnector, Full<Bytes>>,
}

#[derive(Debug, PartialEq)]
struct Response {
    status: StatusCode,
    headers: HeaderMap,
    body: Bytes,
}

impl Example {
    async fn start(name: &str) -> Self {
        Self::start_with(name, None).await
    }

    async fn start_with(name: &str, directory: Option<&Path>) -> Self {
        let directory = directory.map(|directory| ("DIRECTORY", directory.to_str().expect("a plain path")));
        Self::start_in(name, directory.as_slice()).await
    }

    async fn start_in(name: &str, environment: &[(&str, &str)]) -> Self {
        let binary = binary(name);
        let child = Command::new(&binary)
            .envs(environment.iter().copied())
            .env("LISTEN", "127.0.0.1:0")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn();
        let mut child = child.unwrap_or_else(|error| {
            panic!(
                "{} cannot be run ({error}); build it with `cargo build --examples --features axum`",
                binary.display()
            )
        });
        let stdout = child.stdout.take().expect("stdout is piped");
        let mut example = Self {
            child,
            stdout: BufReader::new(stdout).lines(),
            origin: String::new(),
            client: Client::builder(TokioExecutor::new())
                .pool_max_idle_per_host(0)
                .build_http(),
        };
        let line = example.line().await;
        let address = line
            .strip_prefix("listening on ")
            .expect("the first line of the output is the address");
        example.origin = format!("http://{}", address.trim_start_matches("http://"));
        example
    }

    /// Returns the next line that the example prints.
    async fn line(&mut self) -> String {
        let line = timeout(PATIENCE, self.stdout.next_line())
            .await
            .expect("the example prints a line in time");
        line.expect("the output is text")
            .expect("the example prints another line")
    }

    async fn get(&self, path: &str) -> Response {
        let request = Request::get(format!("{}{path}", self.origin)).body(Full::default());
        self.send(&self.client, request.expect("a request")).await
    }

    async fn post(&self, path: &str, headers: &[(&str, &str)], body: &'static str) -> Response {
        let request = self.request(path, headers, body);
        self.send(&self.client, request).await
    }

    fn request(&self, path: &str, headers: &[(&str, &str)], body: &'static str) -> Request<Full<Bytes>> {
        let mut request = Request::post(format!("{}{path}", self.origin));
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        request.body(Full::from(body)).expect("a request")
    }

    async fn send(&self, client: &Client<HttpConnector, Full<Bytes>>, request: Request<Full<Bytes>>) -> Response {
        let response = async {
            let (head, body) = client
                .request(request)
                .await
                .expect("the example responds")
                .into_parts();
            Response {
                status: head.status,
                headers: head.headers,
                body: body.collect().await.expect("a whole body").to_bytes(),
            }
        };
        timeout(PATIENCE, response).await.expect("the example responds in time")
    }

    /// Sends a request and hangs up as soon as the handler prints that it begins.
    async fn hang_up_on(&mut self, path: &str, headers: &[(&str, &str)], body: &'static str) {
        let response = self.client.request(self.request(path, headers, body));
        tokio::select! {
            _ = response => panic!("the example responded before the handler began"),
            line = timeout(PATIENCE, self.stdout.next_line()) => {
                let line = line.expect("the handler begins in time").expect("text").expect("a line");
                assert!(line.ends_with(" begins"), "{line}");
            }
        }
    }

    /// Stops the example as Ctrl-C does.
    async fn interrupt(&mut self) -> ExitStatus {
        let id = self.child.id().expect("the example is running").to_string();
        let sent = Command::new("sh").args(["-c", "kill -INT \"$0\"", &id]).status().await;
        assert!(sent.expect("a shell").success());
        let ended = timeout(PATIENCE, self.child.wait())
            .await
            .expect("the example exits in time");
        ended.expect("an exit status")
    }

    /// Stops the example as a power cut does.
    async fn kill(mut self) {
        self.child.kill().await.expect("the example can be killed");
    }
}

async fn run(name: &str) -> String {
    run_with(name, &[]).await
}

/// Runs an example to its end and returns its output. An example exits with an error if its claim
/// is false.
async fn run_with(name: &str, environment: &[(&str, &str)]) -> String {
    let mut command = Command::new(binary(name));
    command.envs(environment.iter().copied());
    // `reqwest` uses the proxies of the environment, and a proxy on another machine cannot reach
    // the servers of this one.
    command.env("NO_PROXY", "127.0.0.1");
    let ended = timeout(PATIENCE, command.kill_on_drop(true).stdin(Stdio::null()).output());
    let ended = ended
        .await
        .expect("the example exits in time")
        .expect("the example can be run");
    let printed = String::from_utf8(ended.stdout).expect("text");
    let error = String::from_utf8_lossy(&ended.stderr);
    assert!(ended.status.success(), "{name}: {printed}\n{error}");
    printed
}

/// The path of an example: cargo puts examples beside the folder of this test.
fn binary(name: &str) -> PathBuf {
    let test = std::env::current_exe().expect("the path of this test");
    let profile = test.ancestors().nth(2).expect("target/PROFILE/deps/TEST");
    profile
        .join("examples")
        .join(name)
        .with_extension(std::env::consts::EXE_EXTENSION)
}

impl Response {
    fn is_replayed(&self) -> bool {
        self.headers
            .get("idempotent-replayed")
            .is_some_and(|value| value == "true")
    }

    fn json(&self) -> Value {
        serde_json::from_slice(&self.body).expect("a JSON body")
    }

    /// Checks that this is the response `first`, replayed.
    fn assert_replays(&self, first: &Self) {
        assert!(!first.is_replayed() && self.is_replayed(), "{first:?}, then {self:?}");
        assert_eq!((self.status, &self.body), (first.status, &first.body));
        assert_eq!(self.headers.get(header::LOCATION), first.headers.get(header::LOCATION));
        assert_eq!(
            self.headers.get(header::CONTENT_TYPE),
            first.headers.get(header::CONTENT_TYPE)
        );
    }

    fn assert_refused(&self, status: u16, code: &str) {
        assert_eq!(self.headers[header::CONTENT_TYPE], "application/problem+json");
        assert_eq!((self.status.as_u16(), &self.json()["code"]), (status, &json!(code)));
    }
}

mod payments {
    use super::*;

    const JSON: (&str, &str) = ("content-type", "application/json");
    const ORDER: &[(&str, &str)] = &[JSON, ("idempotency-key", "\"order-1\"")];

    async fn charges(bank: &Example) -> usize {
        bank.get("/charges").await.json().as_array().expect("a list").len()
    }

    #[tokio::test]
    async fn an_order_is_charged_once() {
        let shop = Example::start("payments").await;
        let pay = || shop.post("/payments", ORDER, r#"{"amount": 4200}"#);
        let (one, other) = join(pay(), pay()).await;
        let (first, second) = if one.is_replayed() { (other, one) } else { (one, other) };
        assert_eq!(first.status, StatusCode::CREATED);
        assert_eq!(first.json(), json!({ "id": 1, "amount": 4200 }));
        assert!(first.headers.contains_key(header::LOCATION));
        second.assert_replays(&first);
        pay().await.assert_replays(&first);
        assert_eq!(shop.get("/charges").await.json(), json!([{ "id": 1, "amount": 4200 }]));
    }

    #[tokio::test]
    async fn a_lost_response_is_replayed() {
        let mut shop = Example::start("payments").await;
        shop.hang_up_on("/payments", ORDER, r#"{"amount": 4200}"#).await;
        let response = shop.post("/payments", ORDER, r#"{"amount": 4200}"#).await;
        assert!(response.is_replayed());
        assert_eq!(response.json()["id"], 1);
        assert_eq!(charges(&shop).await, 1);
    }

    #[tokio::test]
    async fn another_amount_under_the_same_key_is_refused() {
        let shop = Example::start("payments").await;
        shop.post("/payments", ORDER, r#"{"amount": 4200}"#).await;
        let more = shop.post("/payments", ORDER, r#"{"amount": 4300}"#).await;
        more.assert_refused(422, "key-reused");
        assert_eq!(charges(&shop).await, 1);
    }

    #[tokio::test]
    async fn without_a_key_every_request_is_a_charge() {
        let shop = Example::start("payments").await;
        let pay = || shop.post("/payments", &[JSON], r#"{"amount": 4200}"#);
        let responses = join_all([pay(), pay()]).await;
        assert!(responses.iter().all(|response| !response.is_replayed()));
        assert_eq!(charges(&shop).await, 2);
    }

    /// Kills the server in the middle of a payment, and checks that a retry does not run.
    async fn kill_owner(shop: &Example, moment: &str) {
        let request = shop.request(
            "/payments",
            &[ORDER[0], ORDER[1], ("kill-server", moment)],
            r#"{"amount": 4200}"#,
        );
        let killed = timeout(PATIENCE, shop.client.request(request)).await;
        assert!(
            killed.expect("it dies in time").is_err(),
            "a dead server does not respond"
        );
        let retry = shop.post("/payments", ORDER, r#"{"amount": 4200}"#).await;
        retry.assert_refused(409, "outcome-unknown");
    }

    #[tokio::test]
    async fn a_killed_owner_leaves_409_until_an_operator_resolves_the_key() {
        for (moment, finding, made_before) in [
            ("after-charge", r#"{"key": "order-1", "charge": 1}"#, 1),
            ("before-charge", r#"{"key": "order-1"}"#, 0),
        ] {
            let shop = Example::start("payments").await;
            let resolve = || shop.post("/operator/resolve", &[JSON], finding);
            kill_owner(&shop, moment).await;
            assert_eq!(charges(&shop).await, made_before);
            assert_eq!(resolve().await.status, StatusCode::OK);

            let retry = shop.post("/payments", ORDER, r#"{"amount": 4200}"#).await;
            assert_eq!(
                (retry.status, retry.is_replayed()),
                (StatusCode::CREATED, made_before == 1)
            );
            assert_eq!(retry.json(), json!({ "id": 1, "amount": 4200 }));
            assert_eq!(retry.headers[header::LOCATION], "/charges#1");
            assert_eq!(charges(&shop).await, 1);
            assert_eq!(resolve().await.status, StatusCode::CONFLICT, "the key is completed");
        }
    }

    #[test]
    fn the_page_shows_the_code_that_runs() {
        let source = include_str!("../examples/payments.rs");
        let page = include_str!("../examples/payments.html");
        for id in ["setup", "resolution"] {
            let (_, code) = page.split_once(&format!("<code id=\"{id}\">")).expect(id);
            let (code, _) = code.split_once("</code></pre>").expect(id);
            let code = code.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&");
            let source: Vec<&str> = source.lines().map(str::trim).collect();
            let code: Vec<&str> = code.lines().map(str::trim).collect();
            assert!(source.windows(code.len()).any(|lines| lines == code), "{id}: {code:?}");
        }
    }

    #[tokio::test]
    async fn the_page_is_served_and_loads_nothing_from_other_hosts() {
        let page = Example::start("payments").await.get("/").await;
        let html = std::str::from_utf8(&page.body).expect("text");
        assert!(html.contains("<title>Paid once</title>"));
        assert!(!html.contains("//cdn") && !html.contains("https://"));
    }
}

mod per_route {
    use super::*;

    const ALPHA: (&str, &str) = ("authorization", "Bearer alpha-token");
    const BETA: (&str, &str) = ("authorization", "Bearer beta-token");
    const KEY: (&str, &str) = ("idempotency-key", "k");

    #[tokio::test]
    async fn callers_without_a_token_are_rejected_and_health_is_not_covered() {
        let api = Example::start("per_route").await;
        let rejected = api.post("/payments", &[KEY], "100").await;
        assert_eq!(rejected.status, StatusCode::UNAUTHORIZED);
        assert_eq!(api.get("/health").await.body, "fine\n");
    }

    #[tokio::test]
    async fn a_payment_needs_a_key_and_is_made_once_for_each_tenant() {
        let api = Example::start("per_route").await;
        for path in ["/payments", "/v2/payments"] {
            api.post(path, &[ALPHA], "100").await.assert_refused(400, "key-missing");
        }
        let first = api.post("/payments", &[ALPHA, KEY], "100").await;
        assert_eq!(first.status, StatusCode::CREATED);
        api.post("/payments", &[ALPHA, KEY], "100").await.assert_replays(&first);
        let other = api.post("/payments", &[BETA, KEY], "100").await;
        assert_eq!(other.status, StatusCode::CREATED);
        assert!(!other.is_replayed() && other.body != first.body);
    }

    async fn report(api: &Example, key: &str, day: &'static str) -> Response {
        api.post("/reports", &[ALPHA, ("idempotency-key", key)], day).await
    }

    #[tokio::test]
    async fn reports_do_not_wait_and_decide_whether_their_response_is_stored() {
        let api = Example::start("per_route").await;
        let (one, other) = join(report(&api, "m", "monday"), report(&api, "m", "monday")).await;
        let (stored, refused) = if one.status.is_success() {
            (one, other)
        } else {
            (other, one)
        };
        refused.assert_refused(409, "request-outstanding");
        report(&api, "m", "monday").await.assert_replays(&stored);
        let today = report(&api, "t", "today").await;
        assert!(!report(&api, "t", "today").await.is_replayed() && today.status.is_success());
    }

    #[tokio::test]
    async fn a_failed_mail_is_not_sent_again() {
        let api = Example::start("per_route").await;
        let failed = api.post("/emails", &[ALPHA, KEY], "nobody").await;
        assert_eq!(failed.status, StatusCode::BAD_GATEWAY);
        assert!(failed.body.ends_with(b"attempt 1 under key k\n"));
        api.post("/emails", &[ALPHA, KEY], "nobody")
            .await
            .assert_replays(&failed);
        let unprotected = api.post("/emails", &[ALPHA], "nobody").await;
        assert!(unprotected.body.ends_with(b"without a key\n"));
    }

    #[tokio::test]
    async fn one_function_chooses_the_settings_of_v2() {
        let api = Example::start("per_route").await;
        let paid = api.post("/v2/payments", &[ALPHA, KEY], "100").await;
        api.post("/v2/payments", &[ALPHA, KEY], "100")
            .await
            .assert_replays(&paid);
        let elsewhere = api.post("/payments", &[ALPHA, KEY], "100").await;
        elsewhere.assert_refused(422, "key-reused");

        let quotes = join_all([(); 2].map(|()| api.post("/v2/quotes", &[ALPHA, KEY], "100"))).await;
        assert!(quotes[0].body != quotes[1].body);
        let failed = api
            .post("/v2/emails", &[ALPHA, ("idempotency-key", "e")], "nobody")
            .await;
        let again = api
            .post("/v2/emails", &[ALPHA, ("idempotency-key", "e")], "nobody")
            .await;
        assert!(
            !again.is_replayed() && again.body != failed.body,
            "v2 does not store a 5xx response"
        );
    }

    #[tokio::test]
    async fn a_shutdown_finishes_a_request_whose_caller_has_left() {
        let mut api = Example::start("per_route").await;
        api.hang_up_on("/payments", &[ALPHA, KEY], "100").await;
        assert!(api.interrupt().await.success());
        assert_eq!(api.line().await, "payment 1 of alpha is made");
        assert_eq!(api.line().await, "everything is finished");
    }
}

mod custom_store {
    use super::*;

    const KEY: &[(&str, &str)] = &[("idempotency-key", "k")];

    /// A directory that is removed when the value is dropped.
    struct Scratch(PathBuf);

    impl Scratch {
        fn new(name: &str) -> Self {
            let name = format!("tower-idempotency-{name}-{}", std::process::id());
            let path = std::env::temp_dir().join(name);
            std::fs::create_dir(&path).expect("a new directory");
            Self(path)
        }

        async fn serve(&self) -> Example {
            Example::start_with("custom_store", Some(&self.0)).await
        }

        fn record(&self) -> PathBuf {
            let entries = std::fs::read_dir(&self.0).expect("the directory");
            let mut records = entries.map(|entry| entry.expect("an entry").path());
            let record = records.find(|path| !path.ends_with("next"));
            record.expect("a record")
        }
    }

    impl Drop for Scratch {
        fn drop(&mut self) {
            drop(std::fs::remove_dir_all(&self.0));
        }
    }

    #[tokio::test]
    async fn a_response_survives_a_kill_and_a_restart() {
        let directory = Scratch::new("replay");
        let shop = directory.serve().await;
        let first = shop.post("/orders", KEY, "two teapots").await;
        assert_eq!(first.status, StatusCode::OK);
        shop.post("/orders", KEY, "two teapots").await.assert_replays(&first);
        shop.kill().await;

        let shop = directory.serve().await;
        shop.post("/orders", KEY, "two teapots").await.assert_replays(&first);
        let other = shop.post("/orders", KEY, "three teapots").await;
        other.assert_refused(422, "key-reused");
    }

    #[tokio::test]
    async fn an_order_that_was_cut_off_is_never_run_again() {
        let directory = Scratch::new("lost");
        let mut shop = directory.serve().await;
        shop.hang_up_on("/orders", KEY, "two teapots").await;
        shop.kill().await;

        let shop = directory.serve().await;
        let response = shop.post("/orders", KEY, "two teapots").await;
        response.assert_refused(409, "outcome-unknown");
    }

    #[tokio::test]
    async fn a_damaged_record_is_not_an_absent_one() {
        let directory = Scratch::new("damaged");
        let shop = directory.serve().await;
        shop.post("/orders", KEY, "two teapots").await;
        for damaged in [
            &b""[..],
            b"\x01",
            b"not a record, but as long as one would be, or longer: no matter",
        ] {
            std::fs::write(directory.record(), damaged).expect("a damaged record");
            let response = shop.post("/orders", KEY, "two teapots").await;
            response.assert_refused(500, "record-unreadable");
        }
    }
}

mod bare_hyper {
    use super::*;

    const KEY: &[(&str, &str)] = &[("idempotency-key", "k")];

    #[tokio::test]
    async fn an_order_keeps_its_number_over_either_version_of_http() {
        let shop = Example::start("bare_hyper").await;
        let first = shop.post("/", KEY, "two teapots").await;
        assert_eq!(
            (first.status, &first.body[..]),
            (StatusCode::CREATED, &b"order 1: two teapots\n"[..])
        );
        shop.post("/", KEY, "two teapots").await.assert_replays(&first);

        let http2 = Client::builder(TokioExecutor::new()).http2_only(true).build_http();
        let again = shop.send(&http2, shop.request("/", KEY, "two teapots")).await;
        again.assert_replays(&first);
        let keyless = shop.post("/", &[], "two teapots").await;
        assert_eq!(keyless.body, "order 2: two teapots\n");
    }

    #[tokio::test]
    async fn a_shutdown_finishes_a_request_whose_caller_has_left() {
        let mut shop = Example::start("bare_hyper").await;
        shop.hang_up_on("/", KEY, "two teapots").await;
        assert!(shop.interrupt().await.success());
        assert_eq!(shop.line().await, "order 1 is taken");
        assert_eq!(shop.line().await, "everything is finished");
    }
}

mod conformance_target {
    use super::*;

    #[tokio::test]
    async fn it_counts_one_execution_for_one_key() {
        let target = Example::start("conformance_target").await;
        let headers = &[("idempotency-key", "k"), ("x-test-tag", "t")];
        let first = target.post("/default", headers, "").await;
        target.post("/default", headers, "").await.assert_replays(&first);
        let count = target.get("/executions?tag=t").await.json();
        assert_eq!(count, json!({ "started": 1, "finished": 1 }));
    }
}

#[cfg(feature = "retry")]
mod clients {
    use super::run;

    #[tokio::test]
    async fn a_bank_with_keys_charges_once() {
        let printed = run("client_stripe_like").await;
        assert!(printed.contains("order-4711: ch_1 after 4 attempts"), "{printed}");
        assert!(
            printed.ends_with("the bank charged [\"4200\", \"1700\"]\n"),
            "{printed}"
        );
    }

    #[tokio::test]
    async fn an_id_of_our_own_makes_one_transfer() {
        let printed = run("client_generated_id").await;
        assert_eq!(printed.matches("payout-31 was made before\n").count(), 2, "{printed}");
        assert!(
            printed.ends_with("the third party transferred [1700, 4200]\n"),
            "{printed}"
        );
    }

    #[cfg(all(feature = "once", feature = "reqwest"))]
    #[tokio::test]
    async fn a_job_of_steps_is_resumed_after_each_kill() {
        let printed = run("client_drafts").await;
        // The job records its draft, so it makes no second one, however often it runs.
        assert_eq!(printed.matches("at a draft\n").count(), 2, "{printed}");
        assert_eq!(printed.matches("at sending it\n").count(), 2, "{printed}");
        assert!(printed.ends_with("2 drafts, and 1 of them was sent\n"), "{printed}");
    }

    #[cfg(feature = "reqwest")]
    #[tokio::test]
    async fn a_lost_call_is_looked_up_at_the_third_party() {
        let printed = run("client_existence_check").await;
        for asked in ["asks for taken: found\n", "asks for not-taken: not found\n"] {
            assert_eq!(printed.matches(asked).count(), 1, "{printed}");
        }
        assert!(
            printed.contains("the third party has [\"taken\", \"not-taken\"]\n"),
            "{printed}"
        );
    }

    #[cfg(feature = "reqwest")]
    #[tokio::test]
    async fn the_layers_wrap_reqwest() {
        let printed = run("reqwest_client").await;
        assert!(printed.starts_with("ch_1 after 3 attempts"), "{printed}");
        assert!(printed.ends_with("the bank charged [\"4200\"]\n"), "{printed}");
    }

    #[cfg(feature = "reqwest")]
    #[tokio::test]
    async fn a_chain_charges_once_for_each_purpose() {
        let printed = run("client_chain").await;
        assert_eq!(printed.matches("the shop takes the order\n").count(), 2, "{printed}");
        assert!(
            printed.contains("after 3 attempts: ordered, paid by ch_1 and ch_2\n"),
            "{printed}"
        );
        assert!(printed.ends_with("the bank charged [\"4200\", \"490\"]\n"), "{printed}");
    }
}

#[cfg(all(feature = "reqwest", feature = "testing", feature = "webhooks"))]
#[tokio::test]
async fn webhooks_are_handled_once_and_forged_ones_never() {
    let printed = run("webhooks").await;
    assert_eq!(
        printed.matches("200 OK: handled paid as number 1\n").count(),
        2,
        "{printed}"
    );
    assert_eq!(
        printed.matches("200 OK: handled shipped as number 2\n").count(),
        1,
        "{printed}"
    );
    assert_eq!(printed.matches("409 Conflict").count(), 2, "{printed}");
    assert_eq!(printed.matches("401 Unauthorized").count(), 2, "{printed}");
}

#[cfg(any(feature = "postgres", feature = "redis"))]
#[path = "support/port.rs"]
mod port;

#[cfg(feature = "postgres")]
#[path = "support/postgres.rs"]
mod postgres;

#[cfg(feature = "postgres")]
#[tokio::test(flavor = "multi_thread")]
async fn an_order_that_an_outbox_sends_twice_is_shipped_once() {
    let server = postgres::PostgresServer::start();
    let printed = run_with("outbox", &[("DATABASE_URL", &server.url())]).await;
    assert_eq!(printed.matches("publication 1: First(())\n").count(), 16, "{printed}");
    assert_eq!(printed.matches("publication 2: Duplicate\n").count(), 16, "{printed}");
    assert!(printed.ends_with("16 orders paid, 16 shipped\n"), "{printed}");
}

#[cfg(feature = "postgres")]
mod postgres_transaction {
    use super::postgres::PostgresServer;
    use super::{Example, StatusCode, json};

    async fn start(server: &PostgresServer) -> Example {
        Example::start_in("postgres_transaction", &[("DATABASE_URL", &server.url())]).await
    }

    async fn rows(example: &Example) -> usize {
        let response = example.get("/payments").await;
        let rows: serde_json::Value = serde_json::from_slice(&response.body).expect("JSON");
        rows.as_array().expect("a list").len()
    }

    const HEADERS: [(&str, &str); 2] = [("idempotency-key", "order-1"), ("content-type", "application/json")];
    const BODY: &str = "{\"amount\": 4200}";

    #[tokio::test(flavor = "multi_thread")]
    async fn a_payment_that_is_sent_twice_and_killed_half_way_is_one_row() {
        let server = PostgresServer::start();
        let example = start(&server).await;
        let both = futures::future::join(
            example.post("/payments", &HEADERS, BODY),
            example.post("/payments", &HEADERS, BODY),
        );
        let (one, two) = both.await;
        assert_eq!((one.status, &one.body), (StatusCode::CREATED, &two.body));
        let payment: serde_json::Value = serde_json::from_slice(&one.body).expect("JSON");
        assert_eq!(payment, json!({ "id": 1, "amount": 4200 }));
        let mut example = example;
        assert!(example.line().await.ends_with("not yet committed"));

        let second = [("idempotency-key", "order-2"), HEADERS[1]];
        let request = example.request("/payments", &second, BODY);
        let sent = tokio::spawn(example.client.request(request));
        assert!(example.line().await.ends_with("not yet committed"));
        example.kill().await;
        assert!(sent.await.expect("a task").is_err());

        let example = start(&server).await;
        assert_eq!(rows(&example).await, 1);
        let response = example.post("/payments", &second, BODY).await;
        // The lost attempt counts as in flight until its lease of five seconds ends. A waiter gets
        // 409 before that.
        let response = match response.status {
            StatusCode::CONFLICT => example.post("/payments", &second, BODY).await,
            _ => response,
        };
        assert_eq!(response.status, StatusCode::CREATED, "{response:?}");
        assert_eq!(rows(&example).await, 2);
    }
}

#[cfg(feature = "redis")]
#[path = "support/redis.rs"]
mod redis_server;

#[cfg(feature = "redis")]
mod redis {
    use super::redis_server::RedisServer;
    use super::{Example, StatusCode};

    #[tokio::test(flavor = "multi_thread")]
    async fn two_processes_charge_once() {
        let server = RedisServer::start();
        let url = server.url();
        let environment = [("REDIS_URL", &*url)];
        let (mut one, mut two) = futures::future::join(
            Example::start_in("redis", &environment),
            Example::start_in("redis", &environment),
        )
        .await;
        let headers = [("idempotency-key", "order-1")];
        let both = futures::future::join(
            one.post("/payments", &headers, "4200"),
            two.post("/payments", &headers, "4200"),
        );
        let (first, second) = both.await;
        assert_eq!((first.status, &first.body), (StatusCode::CREATED, &second.body));
        let began = tokio::select! {
            line = one.line() => line,
            line = two.line() => line,
        };
        assert_eq!(began, "a charge of 4200 begins");
        let more = tokio::select! {
            line = one.stdout.next_line() => Some(line),
            line = two.stdout.next_line() => Some(line),
            () = tokio::time::sleep(std::time::Duration::from_millis(200)) => None,
        };
        assert!(more.is_none(), "both processes charged: {more:?}");
    }
}

/// The example checks its claims itself.
#[tokio::test]
async fn a_key_in_the_body_counts_and_a_header_beside_it_does_not() {
    assert!(run("key_in_body").await.contains("once"));
}
