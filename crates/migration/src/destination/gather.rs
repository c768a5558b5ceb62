//! Collects all connections of one source.

use std::collections::BTreeMap;
use std::io;
use std::time::Instant;

use super::{DestinationConfig, answer_other};
use crate::error::MigrationError;
use crate::link::{Accept, Link};
use crate::wire::control::{Control, Hello, MigrationId, PeerStatus, Purpose};
use crate::wire::stream::{Side, Stream};

/// The connections of one migration, by index.
pub(super) struct Group<L> {
    pub(super) id: MigrationId,
    pub(super) hello: Hello,
    pub(super) streams: Vec<Stream<L>>,
}

/// Sources at a time that have not opened all of their connections. Beyond that the oldest is
/// dropped.
const MAX_SOURCES: usize = 8;

/// A source that has not opened all of its connections.
struct Partial<L> {
    hello: Hello,
    deadline: Instant,
    streams: BTreeMap<u8, Stream<L>>,
}

/// Waits until a source has opened all of its connections, and returns the first one that has.
/// Refuses a peer that speaks another protocol. Drops a source that does not open all the
/// connections that it announced; meanwhile it blocks no other source.
pub(super) fn gather<A: Accept>(
    config: &DestinationConfig,
    accept: &mut A,
) -> Result<Group<A::Link>, MigrationError> {
    let mut partials: Vec<Partial<A::Link>> = Vec::new();
    loop {
        let until = partials.iter().map(|partial| partial.deadline).chain(config.deadline).min();
        let link = match accept.accept(until) {
            Ok(link) => Some(link),
            Err(error) if is_time_out(&error) && !is_over(config) && !partials.is_empty() => None,
            Err(error) => return Err(MigrationError::link("waiting for a source")(error)),
        };
        let now = Instant::now();
        drop_sources(&mut partials, |partial| partial.deadline <= now);
        let Some((hello, stream)) = link.and_then(|link| accept_hello(config, link)) else {
            continue;
        };
        let belongs = |partial: &Partial<_>| {
            (partial.hello.id, partial.hello.count) == (hello.id, hello.count)
        };
        let at = partials.iter().position(belongs).unwrap_or_else(|| {
            if partials.len() >= MAX_SOURCES {
                let oldest = partials.first().map(|oldest| oldest.hello.id);
                drop_sources(&mut partials, |partial| Some(partial.hello.id) == oldest);
            }
            let deadline = Instant::now() + config.stall;
            let streams = BTreeMap::new();
            partials.push(Partial { hello: hello.clone(), deadline, streams });
            partials.len() - 1
        });
        let Some(partial) = partials.get_mut(at) else { continue };
        partial.streams.insert(hello.index, stream);
        if partial.streams.len() == usize::from(partial.hello.count) {
            let Partial { hello, streams, .. } = partials.swap_remove(at);
            return Ok(Group { id: hello.id, hello, streams: streams.into_values().collect() });
        }
    }
}

/// Drops sources that did not open all of their connections.
fn drop_sources<L>(partials: &mut Vec<Partial<L>>, goes: impl Fn(&Partial<L>) -> bool) {
    partials.retain(|partial| {
        let goes = goes(partial);
        if goes {
            let (id, opened, of) = (&partial.hello.id, partial.streams.len(), partial.hello.count);
            tracing::warn!(%id, opened, of, "a source did not open all of its connections");
        }
        !goes
    });
}

/// The deadline for a source to connect has passed.
fn is_over(config: &DestinationConfig) -> bool {
    config.deadline.is_some_and(|end| Instant::now() >= end)
}

fn is_time_out(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock)
}

/// Reads the hello of a connection. Answers a resolve request, and returns a migration.
fn accept_hello<L: Link>(config: &DestinationConfig, link: L) -> Option<(Hello, Stream<L>)> {
    let hello = read_hello(link, config.stall);
    match hello {
        Ok((hello, mut stream)) if hello.purpose == Purpose::Resolve => {
            let is_gone = config.gone.contains(&hello.id);
            let status = if is_gone { PeerStatus::Gone } else { PeerStatus::Unknown };
            answer_other(&mut stream, status);
            None
        }
        Ok(hello) => Some(hello),
        Err(error) => {
            tracing::warn!(%error, "refused a connection without a valid hello");
            None
        }
    }
}

/// Reads the first frame of a connection.
pub(super) fn read_hello<L: Link>(
    link: L,
    stall: std::time::Duration,
) -> Result<(Hello, Stream<L>), MigrationError> {
    let mut stream = Stream::new(link, stall)?;
    match stream.receive()? {
        Control::Hello(hello) => {
            stream.key(&hello, Side::Destination);
            Ok((hello, stream))
        }
        _ => Err(MigrationError::Peer { what: "a message before the hello" }),
    }
}
