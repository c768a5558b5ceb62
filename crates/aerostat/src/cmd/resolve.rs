//! `aerostat resolve`: resolves an in-doubt migration.

use clap::Args;
use control::api::{MigrationState, ResolveAction};

use crate::guest_arg::GuestArg;
use cli::failure::{Exit, Failure};
use cli::output::{print, print_json};

/// Resolve an in-doubt migration
///
/// If the connection breaks during the switchover, the side that cannot know where
/// the guest runs keeps it paused. Without options the source queries its
/// destination, which is always safe. --run-here and --discard query no peer: the
/// operator must know the state of the other side.
#[derive(Debug, Args)]
pub(crate) struct ResolveArgs {
    /// Name of the guest, or the path of its control socket
    guest: GuestArg,

    /// Run the guest here. First make sure that the process on the other side is dead;
    /// otherwise the guest may run twice
    #[arg(long)]
    run_here: bool,

    /// Never run the guest here. First make sure that it runs on the other side or is
    /// no longer needed
    #[arg(long, conflicts_with = "run_here")]
    discard: bool,

    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &ResolveArgs) -> Result<(), Failure> {
    let action = match (args.run_here, args.discard) {
        (true, _) => ResolveAction::RunHere,
        (_, true) => ResolveAction::Discard,
        _ => ResolveAction::Ask,
    };
    let status = args.guest.connect()?.resolve_migration(action)?;
    if args.json {
        return print_json(&status);
    }
    let text = match status.state {
        MigrationState::Moved => "runs on the other side",
        MigrationState::Failed if action == ResolveAction::Discard => "is discarded here",
        MigrationState::Failed | MigrationState::None | MigrationState::Arrived => "runs here",
        _ => {
            return Err(Failure {
                what: format!("{}: the migration is still in doubt", args.guest),
                hint: "try again when the other side can be reached".into(),
                exit: Exit::Failed,
            });
        }
    };
    print(&format!("{}: {text}\n", args.guest))
}
