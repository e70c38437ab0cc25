//! Tests of the canonical form through its one entry point.

mod change;
mod examples;
mod model;
mod properties;
mod spelling;

use super::CanonicalJson;

fn fed(settings: &CanonicalJson, body: &[u8]) -> Option<Vec<u8>> {
    let mut bytes = Vec::new();
    let mut calls = 0;
    let fed = settings.feed(body, &mut |chunk| {
        calls += 1;
        bytes.extend_from_slice(chunk);
    });
    assert_eq!(fed, calls > 0, "nothing is fed for a body that is not JSON");
    fed.then_some(bytes)
}

fn canonical(body: &str) -> Option<Vec<u8>> {
    fed(&CanonicalJson::new(), body.as_bytes())
}

fn leaving_out(pointers: &[&str]) -> CanonicalJson {
    pointers.iter().fold(CanonicalJson::new(), |settings, pointer| {
        settings.leave_out(pointer).unwrap()
    })
}

#[track_caller]
fn assert_same(bodies: &[&str]) {
    for body in bodies {
        assert!(canonical(body).is_some(), "{body}");
        assert_eq!(canonical(bodies[0]), canonical(body), "{} and {body}", bodies[0]);
    }
}

#[track_caller]
fn assert_all_different(bodies: &[&str]) {
    for (at, one) in bodies.iter().enumerate() {
        assert!(canonical(one).is_some(), "{one}");
        for other in &bodies[at + 1..] {
            assert_ne!(canonical(one), canonical(other), "{one} and {other}");
        }
    }
}
