//! `aerostat resolve`: ends a doubt about where a guest runs.

use clap::Args;
use control::api::{MigrationState, ResolveAction};

use crate::guest_arg::GuestArg;
use cli::failure::{Exit, Failure};
use cli::output::{print, print_json};

/// Ends a doubt about where a guest runs
///
/// When the connection breaks in the moment in which a guest changes sides, the
/// side that cannot know keeps it paused. Without options the source asks its
/// destination, which is always safe. With --run-here or --discard nobody is
/// asked: whoever says so must know what is true.
#[derive(Debug, Args)]
pub(crate) struct ResolveArgs {
    /// Name of the guest, or the path of its control socket
    guest: GuestArg,

    /// Run the guest here. First make sure that it does not run on the other side:
    /// that that process is dead. Else two guests run
    #[arg(long)]
    run_here: bool,

    /// Never run the guest here. First make sure that it runs on the other side, or
    /// is to end
    #[arg(long, conflicts_with = "run_here")]
    give_up: bool,

    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &ResolveArgs) -> Result<(), Failure> {
    let word = match (args.run_here, args.give_up) {
        (true, _) => ResolveAction::RunHere,
        (_, true) => ResolveAction::Discard,
        _ => ResolveAction::Ask,
    };
    let status = args.guest.connect()?.resolve_migration(word)?;
    if args.json {
        return print_json(&status);
    }
    let text = match status.state {
        MigrationState::Moved => "runs on the other side, and no more here",
        MigrationState::Failed if word == ResolveAction::Discard => "is given up here",
        MigrationState::Failed | MigrationState::None | MigrationState::Arrived => "runs here",
        _ => {
            return Err(Failure {
                what: format!("{}: it is still not known where the guest runs", args.guest),
                hint: "ask again when the other side can be reached".into(),
                exit: Exit::Failed,
            });
        }
    };
    print(&format!("{}: {text}\n", args.guest))
}
