//! The cases of `overhead` under criterion, to compare two versions of the crate.
//!
//! `cargo bench --features axum --bench layer`

mod common;

use std::time::Duration;

use common::{Bench, SETTINGS, Variant};
use criterion::{BatchSize, Criterion, Throughput};
use tokio::runtime::Builder;

/// The largest number of stored keys. Only `overhead` measures with a million.
const MOST_STORED: u64 = 1_000;

const BATCH: u64 = 10;

fn main() {
    let mut criterion = Criterion::default()
        .sample_size(20)
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(1))
        .configure_from_args();
    let runtime = Builder::new_current_thread().enable_all().build();
    let runtime = runtime.expect("a runtime without threads starts");
    for setting in SETTINGS.iter().filter(|setting| setting.stored_keys <= MOST_STORED) {
        for kind in setting.kinds {
            let mut group = criterion.benchmark_group(format!("{kind:?}, {}", setting.name));
            group.throughput(Throughput::Elements(BATCH));
            for variant in Variant::ALL {
                let mut bench = runtime.block_on(Bench::new(setting, variant));
                group.bench_function(variant.name(), |bencher| {
                    let bench = std::cell::RefCell::new(&mut bench);
                    bencher.iter_batched(
                        || bench.borrow_mut().requests(*kind, BATCH),
                        |requests| runtime.block_on(bench.borrow().send(*kind, requests)),
                        BatchSize::SmallInput,
                    );
                });
            }
            group.finish();
        }
    }
    criterion.final_summary();
}
