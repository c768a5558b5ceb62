//! Random requests, sequential and concurrent, while the guest allocates: each has one answer.

use std::thread;
use std::time::Instant;

use control::api::{Caches, FreeKind, FreePagesRequest};
use control::{Client, ControlError};
use serde::{Deserialize, Serialize};

use super::{GUEST_MIB, LIMIT, MIB, RequestsOptions, start};
use crate::error::Result;

/// Concurrent clients.
const CLIENTS: u64 = 4;

/// Maximum memory of the busy process in the guest, in MiB.
const BUSY_MIB: u64 = 1024;

/// Size of a file that must be unchanged afterwards, in MiB.
const KEPT_MIB: u64 = 256;

/// The status of a request that ran out of time.
const TIMED_OUT: u16 = 504;

/// Requests while the guest was busy.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StormReport {
    /// Requests sent.
    pub requests: u64,
    /// Those that the guest did.
    pub done: u64,
    /// Those that ended with an error, such as a second hold.
    pub refused: u64,
    /// Those without an answer: timeout, or none from the back end.
    pub lost: u64,
    /// Answers that the device counted as a fault: unrequested or repeated.
    pub faults: u64,
    /// Pages of the guest's file with wrong contents.
    pub wrong_pages: u64,
    /// Total time, in seconds.
    pub wall_s: f64,
}

pub(super) fn measure(
    options: &RequestsOptions,
    progress: &mut dyn FnMut(&str),
) -> Result<StormReport> {
    progress(&format!("storm: booting a guest of {GUEST_MIB} MiB"));
    let (mut fixture, _directory) = start(options, GUEST_MIB)?;
    fixture.guest.run(&format!("fill kept {KEPT_MIB} 1"))?;
    fixture.guest.run(&format!("busy {BUSY_MIB}"))?;
    let clients = (0..CLIENTS).map(|_| fixture.second_client()).collect::<Result<Vec<_>>>()?;
    let began = Instant::now();
    let ends: Ends = thread::scope(|scope| {
        let asking = clients.iter().zip(1..).map(|(client, seed)| {
            scope.spawn(move || ask_at_random(client, seed, options.storm / CLIENTS))
        });
        // All threads start before one is joined.
        let asking: Vec<_> = asking.collect();
        let ends = asking.into_iter().map(|client| client.join().unwrap_or_default());
        ends.fold(Ends::default(), Ends::and)
    });
    let wall_s = began.elapsed().as_secs_f64();
    fixture.guest.run("idle")?;
    let wrong_pages = fixture.number(&format!("verify kept {KEPT_MIB} 1"))?;
    let report = StormReport {
        requests: ends.done + ends.refused + ends.lost,
        done: ends.done,
        refused: ends.refused,
        lost: ends.lost,
        faults: fixture.status()?.faults.total(),
        wrong_pages,
        wall_s,
    };
    progress(&format!("storm: {report:?}"));
    Ok(report)
}

/// How requests ended.
#[derive(Clone, Copy, Default)]
struct Ends {
    done: u64,
    refused: u64,
    lost: u64,
}

impl Ends {
    const fn and(self, other: Self) -> Self {
        Self {
            done: self.done + other.done,
            refused: self.refused + other.refused,
            lost: self.lost + other.lost,
        }
    }

    fn count<T>(&mut self, outcome: std::result::Result<T, ControlError>) {
        let slot = match outcome {
            Ok(_) => &mut self.done,
            Err(ControlError::Answered { status, .. }) if status != TIMED_OUT => &mut self.refused,
            Err(_) => &mut self.lost,
        };
        *slot += 1;
    }
}

/// Sends this many requests, one after the other.
fn ask_at_random(client: &Client, seed: u64, requests: u64) -> Ends {
    let mut random = seed;
    let mut ends = Ends::default();
    for _ in 0..requests {
        // xorshift: any sequence with a long period will do.
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        let free_pages = |kind, reserve_bytes| {
            let timeout_ms = u64::try_from(LIMIT.as_millis()).unwrap_or(u64::MAX);
            let ask = FreePagesRequest { kind, min_block_bytes: None, reserve_bytes, timeout_ms };
            client.request_free_pages(&ask)
        };
        match random % 5 {
            0 => ends.count(client.drop_caches(Caches::All, LIMIT)),
            1 => ends.count(free_pages(FreeKind::Hold, Some((1 + random / 5 % 1024) * MIB))),
            2 => ends.count(client.release_free_pages(LIMIT)),
            _ => ends.count(free_pages(FreeKind::Snapshot, None)),
        }
    }
    ends
}
