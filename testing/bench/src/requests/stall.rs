//! How long a guest process waits for memory while the guest reports its free pages, compared to
//! how long it waits otherwise.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use control::api::FreeKind;
use serde::{Deserialize, Serialize};

use super::free_pages::request;
use super::{GUEST_MIB, RequestsOptions, UNFRAGMENTED_MIB, start};
use crate::error::{BenchError, Result};
use crate::sample::Spread;
use crate::testbed::Testbed;

/// Measuring time in the guest, in ms.
const METER_MS: u64 = 1000;

/// Between two requests: a guest has one vCPU, and continuous reports would compete for half of it.
const PAUSE: Duration = Duration::from_millis(20);

/// Longest wait of a process that allocates and frees 64 KiB all the time.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StallReport {
    /// Size of the guest. Its free memory is fragmented.
    pub guest_mib: u64,
    /// Longest wait without a report, of each round, in ms.
    pub alone_ms: Spread,
    /// Longest wait while reports run, of each round, in ms.
    pub with_ms: Spread,
    /// Difference of the medians, in ms.
    pub added_ms: f64,
    /// Reports in all rounds.
    pub reports: u64,
}

pub(super) fn measure(
    options: &RequestsOptions,
    progress: &mut dyn FnMut(&str),
) -> Result<StallReport> {
    progress(&format!("stall: booting a guest of {GUEST_MIB} MiB"));
    let (mut fixture, _directory) = start(options, GUEST_MIB)?;
    fixture.guest.run("insmod lab_memory")?;
    fixture.guest.fragment(UNFRAGMENTED_MIB)?;
    let (mut alone, mut with, mut reports) = (Vec::new(), Vec::new(), 0);
    for round in 1..=options.rounds {
        let longest_alone = longest_ms(&mut fixture)?;
        let (longest_with, asked) = longest_beside_reports(&mut fixture)?;
        progress(&format!(
            "round {round}, longest wait {longest_alone:.3} ms alone, {longest_with:.3} ms with {asked} reports"
        ));
        alone.push(longest_alone);
        with.push(longest_with);
        reports += asked;
    }
    let (alone_ms, with_ms) = (Spread::of(alone), Spread::of(with));
    let added_ms = with_ms.median - alone_ms.median;
    Ok(StallReport { guest_mib: GUEST_MIB, alone_ms, with_ms, added_ms, reports })
}

fn longest_beside_reports(fixture: &mut Testbed) -> Result<(f64, u64)> {
    let over = AtomicBool::new(false);
    let client = fixture.second_client()?;
    thread::scope(|scope| {
        let asking = scope.spawn(|| {
            let mut asked = 0;
            while !over.load(Ordering::Relaxed) {
                request(&client, FreeKind::Snapshot)?;
                asked += 1;
                thread::sleep(PAUSE);
            }
            Ok::<_, BenchError>(asked)
        });
        let longest = longest_ms(fixture);
        over.store(true, Ordering::Relaxed);
        let asked = asking.join().unwrap_or(Ok(0))?;
        Ok((longest?, asked))
    })
}

fn longest_ms(fixture: &mut Testbed) -> Result<f64> {
    let command = format!("stall {METER_MS}");
    let answer = fixture.guest.run(&command)?.text;
    let first = answer.split_whitespace().next().and_then(|word| word.strip_prefix("longest_us="));
    let us: Option<f64> = first.and_then(|us| us.parse().ok());
    us.map(|us| us / 1e3).ok_or(BenchError::GuestAnswer { command, answer })
}
