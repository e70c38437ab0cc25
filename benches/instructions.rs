//! Sends a number of requests of one case and measures nothing. `instructions.sh` runs this program
//! under valgrind, which counts instructions and allocations.
//!
//! The arguments are a case as `list` prints it, the name of a variant, the number of requests to
//! send, and the number of requests to build. Two runs with different numbers to send build the
//! same number, so that their difference is the cost of sending.

mod common;

use common::{Bench, Kind, SETTINGS, Setting, Variant, noise};
use sha2::{Digest, Sha256};
use tokio::runtime::Builder;

/// The largest number of stored keys. With a million, valgrind would take an hour.
const MOST_STORED: u64 = 1_000;

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments[..] {
        ["list"] => cases().for_each(|(setting, kind)| println!("{}", name(setting, kind))),
        [case, variant, send, build] => {
            let (setting, kind) = cases()
                .find(|(setting, kind)| name(setting, *kind) == case)
                .expect("the case is in the list");
            let [send, build] = [send, build].map(|count| count.parse().expect("a number of requests"));
            run(setting, kind, variant, send, build);
        }
        _ => eprintln!("see benches/instructions.sh"),
    }
}

fn cases() -> impl Iterator<Item = (&'static Setting, Kind)> {
    let settings = SETTINGS.iter().filter(|setting| setting.stored_keys <= MOST_STORED);
    settings.flat_map(|setting| setting.kinds.iter().map(move |kind| (setting, *kind)))
}

fn name(setting: &Setting, kind: Kind) -> String {
    format!("{kind:?}, {}", setting.name)
}

fn run(setting: &Setting, kind: Kind, variant: &str, send: u64, build: u64) {
    // `instructions.sh` subtracts the cost of the hashes. The processor that valgrind simulates has
    // no instructions for SHA-256, although most real processors have them.
    let body = noise(setting.body);
    match variant {
        "sha-256" => {
            for _ in 0..send {
                std::hint::black_box(Sha256::digest(std::hint::black_box(&body)));
            }
        }
        "blake3" => {
            for _ in 0..send {
                std::hint::black_box(blake3::hash(std::hint::black_box(&body)));
            }
        }
        _ => {
            let variant = Variant::ALL.into_iter().find(|other| other.name() == variant);
            let variant = variant.expect("the variant is in `Variant::ALL`");
            let runtime = Builder::new_current_thread().enable_all().build();
            let runtime = runtime.expect("a runtime without threads starts");
            let mut bench = runtime.block_on(Bench::new(setting, variant));
            let mut requests = bench.requests(kind, build);
            let rest = requests.split_off(usize::try_from(send).expect("few requests"));
            runtime.block_on(bench.send(kind, requests));
            std::mem::forget(rest);
            // Exit without dropping values, because the cost of drops would depend on the number of
            // sent requests.
            std::process::exit(0);
        }
    }
}
