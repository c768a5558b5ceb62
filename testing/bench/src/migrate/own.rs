//! Migrates a guest from `aerostat` to `aerostat`.

use std::path::Path;
use std::time::{Duration, Instant};

use control::api::{MigrationState, MigrationStatus, StartMigration};
use control::{BALLOON_PAGE_BYTES, Client};
use lab::Guest;

use super::{Case, MigrationSample, Scenario, SkippedPages};
use crate::error::{Result, wrong};
use crate::kvm::GuestFiles;
use crate::kvm_host::address_of;
use crate::testbed::Driver;

/// Name of the guest on both sides, which therefore use different sockets.
const NAME: &str = "bench-migrate";

/// Timeout of a migration.
const MOVE_LIMIT: Duration = Duration::from_secs(1200);

/// Between two polls: each costs the only CPU of an emulated host some time.
const POLL_INTERVAL: Duration = Duration::from_millis(250);

/// Free page reporting would release memory before the migration.
const WITHOUT: [&str; 2] = ["--without", "reporting"];

/// A guest and its destination process.
pub(super) struct Fixture {
    pub(super) source: Guest,
    destination: Guest,
    address: String,
    client: Client,
    _directory: lab::Scratch,
}

impl Fixture {
    pub(super) fn start(scenario: Scenario, program: &Path, files: &GuestFiles) -> Result<Self> {
        let directory = lab::Scratch::new("bench")?;
        let socket = |side: &str| directory.path().join(side).to_string_lossy().into_owned();
        let (here, there) = (socket("source"), socket("destination"));
        let mut source = files
            .vmm(program, NAME, scenario.guest_mib)
            .machine_arguments(["--control", &here])
            .machine_arguments(WITHOUT)
            .boot()?;
        files.load_balloon_driver(&mut source, Driver::Own)?;
        let destination = Guest::receiver(program)
            .machine_arguments(["--name", NAME, "--listen", "127.0.0.1:0", "--plain"])
            .machine_arguments(["--control", &there])
            .boot()?;
        let address = address_of(&destination)?;
        let client = Client::connect(Path::new(&here))?;
        Ok(Self { source, destination, address, client, _directory: directory })
    }

    /// Migrates the guest and returns it at its destination.
    pub(super) fn go(mut self, case: Case) -> Result<(Guest, MigrationSample)> {
        self.client.start_migration(&StartMigration {
            to: self.address.clone(),
            connections: Some(connections()),
            drop_caches: case == Case::SkipDropCaches,
            send_free_pages: case == Case::NoSkip,
            ..StartMigration::default()
        })?;
        let end = Instant::now() + MOVE_LIMIT;
        let status = loop {
            std::thread::sleep(POLL_INTERVAL);
            let status = self.client.migration()?;
            if status.state.is_over() || Instant::now() > end {
                break status;
            }
        };
        let moved = sample(&status).ok_or_else(|| {
            wrong(format!("the guest was not migrated: {status:?}\n{}", self.source.console_log()))
        })?;
        let left = self.source.wait()?;
        if !left.success() {
            let log = self.source.console_log();
            return Err(wrong(format!("its VMM ended with {left}\n{log}")));
        }
        Ok((self.destination, moved))
    }
}

/// The default of `aerostat migrate`.
fn connections() -> u8 {
    std::thread::available_parallelism()
        .map_or(1, |count| u8::try_from(count.get()).unwrap_or(4).min(4))
}

fn sample(status: &MigrationStatus) -> Option<MigrationSample> {
    let summary = status.summary.as_ref().filter(|_| status.state == MigrationState::Moved)?;
    let down = &summary.downtime;
    let again = summary.rounds.iter().skip(1).map(|round| round.bytes).sum();
    let rounds = summary.rounds.iter().map(|round| {
        let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
        let (bytes, sent) = (mib(round.bytes), mib(round.sent_bytes));
        format!("{bytes:.1}/{sent:.1} MiB in {:.0} ms", round.took_ms)
    });
    let detail = format!(
        "migration {:.0} ms, free pages reported in {:.1} ms, rounds {}; stopping {:.1}, log {:.1}, last pages {:.1}, saving {:.1}, state {:.1} (loading {:.1}), switchover {:.1} (starting {:.1})",
        summary.total_ms,
        summary.free_answer_ms.unwrap_or_default(),
        rounds.collect::<Vec<_>>().join(", "),
        down.pause_ms,
        down.log_ms,
        down.copy_ms,
        down.save_ms,
        down.state_ms,
        down.load_ms,
        down.switchover_ms,
        down.resume_ms,
    );
    Some(MigrationSample {
        total_ms: status.elapsed_ms,
        downtime_ms: down.total_ms,
        bytes_sent: summary.wire_bytes,
        skipped: SkippedPages {
            free: summary.free_bytes / BALLOON_PAGE_BYTES,
            ballooned: summary.balloon_bytes / BALLOON_PAGE_BYTES,
            zero: summary.zero_bytes / BALLOON_PAGE_BYTES,
        },
        written_bytes: Some(again),
        throttle_percent: summary.throttle_percent,
        detail,
    })
}
