//! Guides: each page begins with a task of yours, and has examples that run as tests.
//!
//! | you want to | read |
//! |---|---|
//! | protect payments, orders, e-mails, webhooks or messages | [`quick_start`] |
//! | know how often a request takes effect when something fails | [`guarantees`] |
//! | know what was tried to break the guarantees | [`evidence`] |
//! | know which responses are stored, or mark one | [`responses`] |
//! | place the layer among timeouts, CORS, routes and other layers | [`layers`] |
//! | choose and set up a store: TLS, replication, poolers, sizing | [`choosing_a_store`] |
//! | shut down, resolve a key, read logs and metrics | [`operations`] |
//! | understand a refusal, an error text or a surprise | [`troubleshooting`] |
//! | call somebody else's API once | [`calling_others`] |
//! | handle messages of a broker once | [`receiving`] |
//! | verify and handle webhooks once | [`webhooks`] |
//! | send messages that belong to a transaction | [`outbox`] |
//! | serve gRPC | `grpc` (feature `tonic`) |
//! | test your handlers | [`testing`] |
//! | put records into another database | [`writing_a_store`] |

/// A page from a file of `docs/`, with the links to items that only a feature brings. Without the feature they lead to the table
/// of features.
macro_rules! page {
    (
        $(#[$attribute:meta])* $name:ident, $path:literal
        $(, [$feature:literal: $item:literal => $target:literal])*
    ) => {
        $(#[$attribute])*
        #[doc = include_str!($path)]
        $(
            #[cfg_attr(feature = $feature, doc = concat!("\n\n[`", $item, "`]: ", $target))]
            #[cfg_attr(not(feature = $feature), doc = concat!("\n\n[`", $item, "`]: crate#features"))]
        )*
        pub mod $name {}
    };
}

// A page is left out of the doctests if its snippets need a feature that is off.

page!(
    #[cfg(any(not(doctest), all(feature = "axum", feature = "postgres", feature = "webhooks")))]
    quick_start,
    "../docs/quick_start.md"
);

page!(
    guarantees,
    "../docs/guarantees.md",
    ["postgres": "PostgresStore" => "crate::PostgresStore"]
);

page!(evidence, "../docs/evidence.md");

page!(responses, "../docs/responses.md");

page!(layers, "../docs/layers.md");

page!(
    choosing_a_store,
    "../docs/choosing_a_store.md",
    ["redis": "RedisStore" => "crate::RedisStore"],
    ["postgres": "PostgresStore" => "crate::PostgresStore"]
);

page!(
    operations,
    "../docs/operations.md",
    ["once": "once" => "crate::client::once()"],
    ["redis": "RedisStore" => "crate::RedisStore"],
    ["postgres": "PostgresStore" => "crate::PostgresStore"]
);

page!(
    troubleshooting,
    "../docs/troubleshooting.md",
    ["redis": "RedisStore" => "crate::RedisStore"],
    ["postgres": "PostgresStore" => "crate::PostgresStore"]
);

page!(
    #[cfg(any(not(doctest), all(feature = "once", feature = "reqwest", feature = "retry")))]
    calling_others,
    "../docs/calling_others.md",
    ["retry": "CallLayer" => "crate::client::CallLayer"],
    ["retry": "CallReport" => "crate::client::CallReport"],
    ["reqwest": "ReqwestService" => "crate::client::ReqwestService"],
    ["follow-redirect": "SameOriginKey" => "crate::client::SameOriginKey"],
    ["once": "once" => "crate::client::once()"]
);

page!(
    #[cfg(any(not(doctest), feature = "postgres"))]
    receiving,
    "../docs/receiving.md",
    ["postgres": "Inbox" => "crate::receiver::Inbox"]
);

page!(
    #[cfg(any(not(doctest), feature = "webhooks"))]
    webhooks,
    "../docs/webhooks.md",
    ["webhooks": "WebhookLayer" => "crate::receiver::webhooks::WebhookLayer"],
    ["webhooks": "VerifyWebhook" => "crate::receiver::webhooks::VerifyWebhook"]
);

page!(
    #[cfg(any(not(doctest), feature = "postgres"))]
    outbox,
    "../docs/outbox.md",
    ["postgres": "Outbox" => "crate::outbox::Outbox"],
    ["postgres": "OutboxMessage" => "crate::outbox::OutboxMessage"],
    ["postgres": "Relay" => "crate::outbox::Relay"]
);

page!(
    #[cfg(feature = "tonic")]
    grpc,
    "../docs/grpc.md"
);

page!(
    #[cfg(any(
        not(doctest),
        all(
            feature = "axum",
            feature = "conformance",
            feature = "postgres",
            feature = "testing",
            feature = "webhooks"
        )
    ))]
    testing,
    "../docs/testing.md"
);

page!(writing_a_store, "../docs/writing_a_store.md");

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    fn root() -> &'static Path {
        Path::new(env!("CARGO_MANIFEST_DIR"))
    }

    fn page(path: &str) -> String {
        fs::read_to_string(root().join(path)).unwrap()
    }

    /// All sources of the crate. A string that a backslash continues on the next line is joined.
    fn sources() -> String {
        let mut folders = vec![root().join("src")];
        let mut sources = String::new();
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(folder).unwrap() {
                let path = entry.unwrap().path();
                match path.extension() {
                    _ if path.is_dir() => folders.push(path),
                    Some(extension) if extension == "rs" => sources += &fs::read_to_string(path).unwrap(),
                    _ => {}
                }
            }
        }
        let mut parts = sources.split("\\\n");
        let first = parts.next().unwrap().to_owned();
        parts.fold(first, |joined, part| joined + part.trim_start())
    }

    /// The quoted words that follow `before` in a text.
    fn words_after<'t>(text: &'t str, before: &str) -> Vec<&'t str> {
        let words = text.split(before).skip(1).map(|rest| rest.split('"').next().unwrap());
        words
            .filter(|word| {
                word.bytes()
                    .all(|byte| byte.is_ascii_lowercase() || b"-_".contains(&byte))
            })
            .collect()
    }

    fn assert_rows(path: &str, words: &[&str]) {
        let page = page(path);
        for word in words {
            let row = format!("| `{word}` | ");
            assert!(page.contains(&row), "{path} has no row for `{word}`");
        }
    }

    #[test]
    fn the_readme_has_at_most_a_thousand_words() {
        let words = page("README.md").split_whitespace().count();
        assert!(words <= 1_000, "the README has {words} words");
    }

    #[test]
    fn every_refusal_is_explained() {
        let sources = sources();
        let codes = words_after(&sources, "code: \"");
        assert!(codes.len() > 20, "{codes:?}");
        assert_rows("docs/troubleshooting.md", &codes);
    }

    #[test]
    fn every_event_and_metric_is_explained() {
        let telemetry = page("src/telemetry.rs");
        let names = telemetry.split("const fn name").nth(1).unwrap();
        let names = names.split("const fn message").next().unwrap();
        let events = words_after(names, "=> \"");
        assert!(events.len() > 20, "{events:?}");
        assert_rows("docs/operations.md", &events);

        let operations = page("docs/operations.md");
        for metric in words_after(&telemetry, "!(\"") {
            assert!(
                operations.contains(&format!("`{metric}")),
                "no row for the metric `{metric}`"
            );
        }
    }

    /// A heading of the troubleshooting page that is a literal text is the beginning of a text of the crate. `rustc` writes
    /// the type in place of `{Self}`.
    #[test]
    fn quoted_errors_have_the_words_of_the_source() {
        let sources = sources().replace("{Self}", "axum::body::Body");
        let page = page("docs/troubleshooting.md");
        let is_literal = |line: &&str| line.starts_with("### `") || line.starts_with("## ``the idempotency layer");
        let mut count = 0;
        for line in page.lines().filter(is_literal) {
            let text = line.trim_start_matches('#').trim_matches(['`', '.', ' ']);
            assert!(sources.contains(&format!("\"{text}")), "no text begins with {text:?}");
            count += 1;
        }
        assert!(count > 10, "{count}");
    }

    /// Links on pages that GitHub renders, and paths that the pages mention.
    #[test]
    fn paths_lead_to_files() {
        if !root().join("CONTRIBUTING.md").exists() {
            return; // A published package leaves some of the files out.
        }
        let docs = fs::read_dir(root().join("docs")).unwrap();
        let docs = docs.map(|entry| format!("docs/{}", entry.unwrap().file_name().to_str().unwrap()));
        let rendered = ["README.md", "examples/README.md", "benches/README.md"];
        for path in rendered.map(str::to_owned).into_iter().chain(docs) {
            let page = page(&path);
            let folder = root().join(&path).parent().unwrap().to_owned();
            let links = page
                .split("](")
                .skip(1)
                .map(|rest| rest.split([')', '#']).next().unwrap());
            let is_file = |link: &&str| !link.is_empty() && !link.starts_with("https:") && !link.starts_with("crate");
            let links = links.filter(is_file).map(|link| folder.join(link));
            let is_path = |text: &&str| {
                ["tests/", "benches/", "examples/"]
                    .iter()
                    .any(|place| text.starts_with(place))
            };
            let mentions = page.split('`').filter(is_path).map(|path| root().join(path));
            for target in links.chain(mentions) {
                assert!(
                    target.exists(),
                    "{path} names {}, which does not exist",
                    target.display()
                );
            }
        }
    }

    /// rustdoc checks the item of a link, but not its anchor.
    #[test]
    fn anchors_lead_to_headings() {
        for entry in fs::read_dir(root().join("docs")).unwrap() {
            let name = entry.unwrap().file_name().into_string().unwrap();
            let text = page(&format!("docs/{name}"));
            let anchors = text.split("](").skip(1).map(|rest| rest.split(')').next().unwrap());
            for anchor in anchors {
                let (file, heading) = match anchor.split_once('#') {
                    Some(("", heading)) => (name.clone(), heading),
                    Some((path, heading)) if path.starts_with("crate::guide::") => {
                        (path.replace("crate::guide::", "") + ".md", heading)
                    }
                    _ => continue,
                };
                let target = page(&format!("docs/{file}"));
                let mut headings = target.lines().filter(|line| line.starts_with('#')).map(anchor_of);
                assert!(
                    headings.any(|anchor| anchor == heading),
                    "docs/{name} links to {file}#{heading}, which does not exist"
                );
            }
        }
    }

    /// The anchor that rustdoc gives to a heading.
    fn anchor_of(heading: &str) -> String {
        let words = heading.trim_matches(['#', ' ']).chars();
        let words = words.filter(|c| c.is_alphanumeric() || [' ', '-', '_'].contains(c));
        words.collect::<String>().to_lowercase().replace(' ', "-")
    }

    #[test]
    fn every_page_is_a_guide() {
        let guide = page("src/guide.rs");
        for entry in fs::read_dir(root().join("docs")).unwrap() {
            let name = entry.unwrap().file_name().into_string().unwrap();
            assert!(
                guide.contains(&format!("\"../docs/{name}\"")),
                "docs/{name} is in no module"
            );
        }
    }
}
