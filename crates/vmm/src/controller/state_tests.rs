//! Both sides of a migration as one system: explores every order of operator actions, lost messages
//! and process deaths.

use std::collections::{HashMap, VecDeque};

use super::*;

/// Switchover messages between source and destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Message {
    /// To the destination: run the guest.
    Commit,
    /// To the destination: the source keeps the guest.
    Rollback,
    /// To the source: the guest runs at the destination.
    Running,
    /// To the source: the guest was destroyed and never ran.
    Gone,
}

/// Two processes and the message in flight. One migration, one connection at a time.
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
        // During a migration the guest runs until the commit.
        let running = Phase::Running { side: MigrationSide::Source, committing: false };
        self.alive
            && (matches!(self.state.guest, Guest::Runs | Guest::Changing)
                || self.state.phase == running)
    }

    fn in_doubt(self) -> bool {
        matches!(self.state.phase, Phase::InDoubt { .. })
    }

    /// The process after the event, if it is alive and its state allows the event.
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

    fn send(self, message: Message) -> Self {
        Self { message: Some(message), ..self }
    }

    fn received(self) -> Self {
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
        add("a message is lost", self.message.map(|_| self.received()));
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
        // Before the commit: the guest continues, and a prepared destination is notified.
        let failed = self.source(Event::Failed).filter(|_| running);
        add("the source gives up", failed.map(|world| world.send(Message::Rollback)));
        add("the source gives up, message lost", failed);
        let stuck = self.source(Event::Unresumable).filter(|_| running);
        add("the guest cannot be resumed", stuck);
        // A destination that is not prepared, and receives nothing more.
        let fails = self.destination(Event::Failed).filter(|_| !self.prepared);
        add("the destination gives up", fails);
    }

    fn switchover(self, add: &mut impl FnMut(&'static str, Option<Self>)) {
        let commit = self.source(Event::Commit).filter(|_| self.prepared && self.message.is_none());
        add("commit", commit.map(|world| world.send(Message::Commit)));
        let ready = self.prepared && self.destination.state.guest != Guest::Runs;
        match self.message {
            Some(Message::Commit) if ready => {
                let starts = self.received().destination(Event::Start);
                let ran = starts.map(|world| Self { ran: true, ..world }.send(Message::Running));
                add("the destination runs it", ran);
                let event =
                    if self.destination.in_doubt() { Event::Discarded } else { Event::Failed };
                let gone = self.received().destination(event);
                let gone = gone.map(|world| Self { prepared: false, ..world });
                add("the destination cannot run it", gone.map(|world| world.send(Message::Gone)));
            }
            Some(Message::Rollback) if ready => {
                let event =
                    if self.destination.in_doubt() { Event::Discarded } else { Event::Failed };
                let gone = self.received().destination(event);
                add("rolled back", gone.map(|world| Self { prepared: false, ..world }));
            }
            Some(Message::Running) => {
                add("the source receives: running", self.received().source(Event::Moved));
            }
            Some(Message::Gone) => {
                let event = if self.source.in_doubt() { Event::Resumed } else { Event::Failed };
                add("the source receives: gone", self.received().source(event));
            }
            _ => {}
        }
        add("the source gets no answer", self.source(Event::Uncertain));
        let unheard = self.prepared && !matches!(self.message, Some(Message::Commit));
        add(
            "the destination gets no message",
            self.destination(Event::Uncertain).filter(|_| unheard),
        );
    }

    /// The source asks, and a destination answers by its state (`DestinationOwnership::answer`).
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
            add("the source asks", answer.map(|message| self.send(message)));
        }
        add("not answered", self.source(Event::ResolveFailed));
        let stuck = matches!(self.source.state.phase, Phase::Stuck { .. });
        add("resumed", self.source(Event::Resumed).filter(|_| stuck));
    }

    /// Operators act correctly: `--run-here` if the peer is dead or has discarded the guest,
    /// `--discard` if the guest runs on the peer.
    fn operators(self, add: &mut impl FnMut(&'static str, Option<Self>)) {
        let resolving = self.source.in_doubt() && self.message.is_none();
        let gone = !self.destination.alive || (!self.prepared && !self.ran);
        add("source: run here", self.source(Event::Resumed).filter(|_| resolving && gone));
        add("source: discard", self.source(Event::Moved).filter(|_| resolving && self.ran));
        let runs_at_source = self.source.runs();
        let left = !self.source.alive;
        let here = self.destination(Event::Start).filter(|_| self.destination.in_doubt() && left);
        add("destination: run here", here.map(|world| Self { ran: true, ..world }));
        let discard = self.destination(Event::Discarded).filter(|_| runs_at_source);
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

    /// No migration is in progress; the operator may have paused the guest.
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

/// Every world reachable from the first one, with its predecessor.
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

/// The events that led to a world, for the failure message.
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
fn no_order_of_events_runs_two_guests_or_loses_the_guest() {
    let seen = explored();
    // A model with few transitions would pass with any state machine.
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

/// While both processes are alive, a source in-doubt that asks gets a resolution.
#[test]
fn a_source_in_doubt_that_asks_is_answered() {
    let seen = explored();
    let mut in_doubt_worlds = 0;
    for world in seen.keys() {
        let World { source, destination, .. } = *world;
        let open = source.state.closed.is_none() && destination.alive && source.alive;
        let settled = !matches!(destination.state.phase, Phase::Running { .. });
        if !source.in_doubt() || !open || !settled || world.message.is_some() {
            continue;
        }
        in_doubt_worlds += 1;
        let mut open = VecDeque::from([*world]);
        let mut tried = vec![*world];
        let found = loop {
            let Some(world) = open.pop_front() else { break false };
            if world.is_quiet() && world.has_guest() {
                break true;
            }
            let resolving = [
                "resolving",
                "the source asks",
                "the destination runs it",
                "the source receives: running",
                "the source receives: gone",
                "destination: resumed",
            ];
            for (name, next) in world.successors() {
                if resolving.contains(&name) && !tried.contains(&next) {
                    tried.push(next);
                    open.push_back(next);
                }
            }
        };
        assert!(found, "{world:?} after {:?}", history(&seen, *world));
    }
    assert!(in_doubt_worlds >= 10, "{in_doubt_worlds} worlds in doubt");
}

#[test]
fn begin_is_refused_unless_the_operator_controls_the_guest() {
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
fn a_closed_process_refuses_to_commit_and_resolve() {
    let here = State { guest: Guest::Runs, ..State::default() };
    let running = here.next(Event::Begin(MigrationSide::Source)).unwrap();
    let closed = running.next(Event::Close("it ends")).unwrap();
    assert_eq!(closed.next(Event::Commit), Err(Refusal::Closed("it ends")));
    let doubtful = running.next(Event::Commit).unwrap().next(Event::Uncertain).unwrap();
    let closed = doubtful.next(Event::Close("it ends")).unwrap();
    assert_eq!(closed.next(Event::ResolveBegin), Err(Refusal::Closed("it ends")));
}
