//! Both sides of a migration as one system, in every order of what operators do, what the network
//! loses and which process dies.

use std::collections::{HashMap, VecDeque};

use super::*;

/// What the source and the destination say to each other about the switchover.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Message {
    /// To the destination: run the guest.
    Commit,
    /// To the destination: the source keeps the guest.
    Rollback,
    /// To the source: it runs here.
    Running,
    /// To the source: it was destroyed and never ran.
    Gone,
}

/// Two processes and what is on its way between them. One migration, one connection at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct World {
    source: Process,
    destination: Process,
    /// The destination has all of the guest.
    prepared: bool,
    /// The destination has run the guest at some time.
    ran: bool,
    message: Option<Message>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Process {
    state: State,
    alive: bool,
}

impl Process {
    /// Whether the guest's vCPUs may run in it.
    fn runs(self) -> bool {
        // While a migration is under way, until its commit, which pauses the guest itself.
        let running = Phase::Running { side: MigrationSide::Source, committing: false };
        self.alive
            && (matches!(self.state.guest, Guest::Runs | Guest::Changing)
                || self.state.phase == running)
    }

    fn in_doubt(self) -> bool {
        matches!(self.state.phase, Phase::InDoubt { .. })
    }

    /// The event, where the process lives and takes it.
    fn after(self, event: Event) -> Option<Self> {
        let state = self.state.next(event).ok().filter(|_| self.alive)?;
        Some(Self { state, ..self })
    }
}

impl World {
    fn begin() -> Self {
        let source =
            Process { state: State { guest: Guest::Runs, ..State::default() }, alive: true };
        let destination = Process { state: State::default(), alive: true };
        Self { source, destination, prepared: false, ran: false, message: None }
    }

    fn source(self, event: Event) -> Option<Self> {
        self.source.after(event).map(|source| Self { source, ..self })
    }

    fn destination(self, event: Event) -> Option<Self> {
        self.destination.after(event).map(|destination| Self { destination, ..self })
    }

    fn says(self, message: Message) -> Self {
        Self { message: Some(message), ..self }
    }

    fn heard(self) -> Self {
        Self { message: None, ..self }
    }

    /// Everything that can happen next, with its name.
    fn successors(self) -> Vec<(&'static str, Self)> {
        let mut next = Vec::new();
        let mut add = |name, world: Option<Self>| next.extend(world.map(|world| (name, world)));
        self.precopy(&mut add);
        self.switchover(&mut add);
        self.resolution(&mut add);
        self.operators(&mut add);
        let dead = |process: Process| Process { alive: false, ..process };
        let (source, destination) = (dead(self.source), dead(self.destination));
        add("the source dies", Some(Self { source, ..self }));
        add("the destination dies", Some(Self { destination, ..self }));
        add("a message is lost", self.message.map(|_| self.heard()));
        next
    }

    fn precopy(self, add: &mut impl FnMut(&'static str, Option<Self>)) {
        const SIDE: MigrationSide = MigrationSide::Source;
        add("the destination waits", self.destination(Event::Wait));
        let begins = self.source(Event::Begin(SIDE));
        add("the source begins", begins.filter(|_| !self.ran && !self.prepared));
        let running = self.source.state.phase == Phase::Running { side: SIDE, committing: false };
        let linked = running && self.source.alive;
        add("it connects", self.destination(Event::Connected).filter(|_| linked));
        let prepared = matches!(self.destination.state.phase, Phase::Running { .. }) && linked;
        add(
            "prepared",
            (prepared && self.destination.alive).then_some(Self { prepared: true, ..self }),
        );
        // Before the commit: the guest runs on, and a destination that has all of it is told.
        let failed = self.source(Event::Failed).filter(|_| running);
        add("the source gives up", failed.map(|world| world.says(Message::Rollback)));
        add("the source gives up unheard", failed);
        let stuck = self.source(Event::Unresumable).filter(|_| running);
        add("the guest cannot be resumed", stuck);
        // One that has not all of it, and hears nothing more.
        let fails = self.destination(Event::Failed).filter(|_| !self.prepared);
        add("the destination gives up", fails);
    }

    fn switchover(self, add: &mut impl FnMut(&'static str, Option<Self>)) {
        let commit = self.source(Event::Commit).filter(|_| self.prepared && self.message.is_none());
        add("commit", commit.map(|world| world.says(Message::Commit)));
        let ready = self.prepared && self.destination.state.guest != Guest::Runs;
        match self.message {
            Some(Message::Commit) if ready => {
                let starts = self.heard().destination(Event::Start);
                let ran = starts.map(|world| Self { ran: true, ..world }.says(Message::Running));
                add("the destination runs it", ran);
                let event =
                    if self.destination.in_doubt() { Event::Discarded } else { Event::Failed };
                let gone = self.heard().destination(event);
                let gone = gone.map(|world| Self { prepared: false, ..world });
                add("the destination cannot run it", gone.map(|world| world.says(Message::Gone)));
            }
            Some(Message::Rollback) if ready => {
                let event =
                    if self.destination.in_doubt() { Event::Discarded } else { Event::Failed };
                let gone = self.heard().destination(event);
                add("rolled back", gone.map(|world| Self { prepared: false, ..world }));
            }
            Some(Message::Running) => {
                add("the source hears: runs", self.heard().source(Event::Moved));
            }
            Some(Message::Gone) => {
                let event = if self.source.in_doubt() { Event::Resumed } else { Event::Failed };
                add("the source hears: gone", self.heard().source(event));
            }
            _ => {}
        }
        add("the source hears nothing", self.source(Event::Uncertain));
        let unheard = self.prepared && !matches!(self.message, Some(Message::Commit));
        add(
            "the destination hears nothing",
            self.destination(Event::Uncertain).filter(|_| unheard),
        );
    }

    /// The source asks, and a destination answers as it is (`DestinationOwnership::answer`).
    fn resolution(self, add: &mut impl FnMut(&'static str, Option<Self>)) {
        add("resolving", self.source(Event::ResolveBegin));
        let asks = matches!(
            self.source.state.phase,
            Phase::InDoubt { side: MigrationSide::Source, resolving: true }
        ) && self.source.alive;
        if asks && self.message.is_none() && self.destination.alive {
            let answer = match self.destination.state.phase {
                _ if self.ran => Some(Message::Running),
                Phase::InDoubt { .. } => Some(Message::Commit),
                Phase::Done { .. } | Phase::Waiting => Some(Message::Gone),
                _ => None,
            };
            add("asked", answer.map(|message| self.says(message)));
        }
        add("not answered", self.source(Event::ResolveFailed));
        let stuck = matches!(self.source.state.phase, Phase::Stuck { .. });
        add("resumed", self.source(Event::Resumed).filter(|_| stuck));
    }

    /// Operators, who know what they say: `--run-here` where the other process is dead or has
    /// discarded the guest, `--discard` where it runs on the other side.
    fn operators(self, add: &mut impl FnMut(&'static str, Option<Self>)) {
        let resolving = self.source.in_doubt() && self.message.is_none();
        let gone = !self.destination.alive || (!self.prepared && !self.ran);
        add("source: run here", self.source(Event::Resumed).filter(|_| resolving && gone));
        add("source: discard", self.source(Event::Moved).filter(|_| resolving && self.ran));
        let kept = self.source.runs();
        let left = !self.source.alive;
        let here = self.destination(Event::Start).filter(|_| self.destination.in_doubt() && left);
        add("destination: run here", here.map(|world| Self { ran: true, ..world }));
        let discard = self.destination(Event::Discarded).filter(|_| kept);
        add("destination: discard", discard.map(|world| Self { prepared: false, ..world }));
        for (name, event) in [
            ("source: pause", Event::Change),
            ("source: paused", Event::Changed { paused: true }),
            ("source: resumed", Event::Changed { paused: false }),
            ("source: ends", Event::Close("it ends")),
        ] {
            add(name, self.source(event));
        }
        for (name, event) in [
            ("destination: pause", Event::Change),
            ("destination: resumed", Event::Changed { paused: false }),
        ] {
            add(name, self.destination(event));
        }
    }

    /// Nothing is under way, and the guest may be paused by its operator.
    fn is_quiet(self) -> bool {
        let quiet =
            |state: State| matches!(state.phase, Phase::Idle | Phase::Waiting | Phase::Done { .. });
        self.message.is_none() && quiet(self.source.state) && quiet(self.destination.state)
    }

    fn has_guest(self) -> bool {
        [self.source, self.destination].iter().any(|process| {
            process.runs() || (process.alive && process.state.guest == Guest::Paused)
        })
    }
}

/// Every world that can come of the first one, and what it came of.
fn explored() -> HashMap<World, Option<(&'static str, World)>> {
    let first = World::begin();
    let mut seen = HashMap::from([(first, None)]);
    let mut open = VecDeque::from([first]);
    while let Some(world) = open.pop_front() {
        for (name, next) in world.successors() {
            if let std::collections::hash_map::Entry::Vacant(entry) = seen.entry(next) {
                entry.insert(Some((name, world)));
                open.push_back(next);
            }
        }
    }
    seen
}

/// How a world came to be, for the message of a failure.
fn history(
    seen: &HashMap<World, Option<(&'static str, World)>>,
    mut world: World,
) -> Vec<&'static str> {
    let mut names = Vec::new();
    while let Some(Some((name, before))) = seen.get(&world) {
        names.push(*name);
        world = *before;
    }
    names.reverse();
    names
}

#[test]
fn no_order_of_events_has_two_guests_run_or_none() {
    let seen = explored();
    // A model in which little can happen would hold whatever the states are.
    assert!(seen.len() > 1000, "{} worlds", seen.len());
    for outcome in [Outcome::Moved, Outcome::Failed] {
        assert!(
            seen.keys()
                .any(|world| world.source.state.phase == done(MigrationSide::Source, outcome))
        );
    }
    for world in seen.keys() {
        let story = || format!("{world:?} after {:?}", history(&seen, *world));
        assert!(!(world.source.runs() && world.destination.runs()), "two: {}", story());
        if world.source.alive && world.destination.alive && world.is_quiet() {
            assert!(world.has_guest(), "none: {}", story());
        }
    }
}

/// Who asks finds out: with both processes alive, a source in doubt comes to an end.
#[test]
fn a_source_in_doubt_that_asks_is_answered() {
    let seen = explored();
    let mut asked = 0;
    for world in seen.keys() {
        let World { source, destination, .. } = *world;
        let open = source.state.closed.is_none() && destination.alive && source.alive;
        let settled = !matches!(destination.state.phase, Phase::Running { .. });
        if !source.in_doubt() || !open || !settled || world.message.is_some() {
            continue;
        }
        asked += 1;
        let mut open = VecDeque::from([*world]);
        let mut tried = vec![*world];
        let found = loop {
            let Some(world) = open.pop_front() else { break false };
            if world.is_quiet() && world.has_guest() {
                break true;
            }
            let goes_on = [
                "resolving",
                "asked",
                "the destination runs it",
                "the source hears: runs",
                "the source hears: gone",
                "destination: resumed",
            ];
            for (name, next) in world.successors() {
                if goes_on.contains(&name) && !tried.contains(&next) {
                    tried.push(next);
                    open.push_back(next);
                }
            }
        };
        assert!(found, "{world:?} after {:?}", history(&seen, *world));
    }
    assert!(asked >= 10, "{asked} worlds in doubt");
}

#[test]
fn nothing_is_begun_with_a_guest_that_is_not_the_operators() {
    let here = State { guest: Guest::Runs, ..State::default() };
    let begin = Event::Begin(MigrationSide::Source);
    let running = here.next(begin).unwrap();
    let doubtful = running.next(Event::Commit).unwrap().next(Event::Uncertain).unwrap();
    let stuck = running.next(Event::Unresumable).unwrap();
    let changing = here.next(Event::Change).unwrap();
    let paused = changing.next(Event::Changed { paused: true }).unwrap();
    for (state, refusal) in [
        (State::default(), Refusal::NoGuest),
        (running, Refusal::Busy),
        (doubtful, Refusal::InDoubt),
        (stuck, Refusal::Stuck),
        (changing, Refusal::Changing),
        (paused, Refusal::Paused),
        (here.next(Event::Close("it ends")).unwrap(), Refusal::Closed("it ends")),
    ] {
        assert_eq!(state.next(begin), Err(refusal));
        if refusal != Refusal::Paused {
            assert_eq!(state.next(Event::Change), Err(refusal));
        }
    }
}

#[test]
fn a_process_that_ends_commits_and_resolves_nothing() {
    let here = State { guest: Guest::Runs, ..State::default() };
    let running = here.next(Event::Begin(MigrationSide::Source)).unwrap();
    let closed = running.next(Event::Close("it ends")).unwrap();
    assert_eq!(closed.next(Event::Commit), Err(Refusal::Closed("it ends")));
    let doubtful = running.next(Event::Commit).unwrap().next(Event::Uncertain).unwrap();
    let closed = doubtful.next(Event::Close("it ends")).unwrap();
    assert_eq!(closed.next(Event::ResolveBegin), Err(Refusal::Closed("it ends")));
}
