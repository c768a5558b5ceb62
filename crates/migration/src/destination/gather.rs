//! All connections of one source.

use std::collections::BTreeMap;
use std::io;
use std::time::Instant;

use super::{DestinationConfig, answer_other};
use crate::error::MigrationError;
use crate::link::{Accept, Link};
use crate::wire::control::{Control, Hello, MigrationId, PeerStatus, Purpose};
use crate::wire::stream::{Side, Stream};

/// The connections of one migration, by number.
pub(super) struct Group<L> {
    pub(super) id: MigrationId,
    pub(super) hello: Hello,
    pub(super) streams: Vec<Stream<L>>,
}

/// Sources that are waited for at a time, each until it has opened all of its connections. Where
/// more come the oldest goes.
const MAX_SOURCES: usize = 8;

/// A source that has not opened all of its connections.
struct Partial<L> {
    hello: Hello,
    deadline: Instant,
    streams: BTreeMap<u8, Stream<L>>,
}

/// Waits for a source with all of its connections: of several, for the first that has opened them.
/// Whoever comes and speaks something else is sent away; a source that does not come with all that
/// it announced is forgotten, and keeps no other away meanwhile.
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
        forget(&mut partials, |partial| partial.deadline <= now);
        let Some((hello, stream)) = link.and_then(|link| greet(config, link)) else { continue };
        let belongs = |partial: &Partial<_>| {
            (partial.hello.id, partial.hello.count) == (hello.id, hello.count)
        };
        let at = partials.iter().position(belongs).unwrap_or_else(|| {
            if partials.len() >= MAX_SOURCES {
                let oldest = partials.first().map(|oldest| oldest.hello.id);
                forget(&mut partials, |partial| Some(partial.hello.id) == oldest);
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

/// Forgets sources that did not open all of their connections.
fn forget<L>(partials: &mut Vec<Partial<L>>, goes: impl Fn(&Partial<L>) -> bool) {
    partials.retain(|partial| {
        let goes = goes(partial);
        if goes {
            let (id, opened, of) = (&partial.hello.id, partial.streams.len(), partial.hello.count);
            tracing::warn!(%id, opened, of, "a source did not open all of its connections");
        }
        !goes
    });
}

/// Nobody is waited for any longer.
fn is_over(config: &DestinationConfig) -> bool {
    config.deadline.is_some_and(|end| Instant::now() >= end)
}

fn is_time_out(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock)
}

/// Hears one connection's hello.
fn greet<L: Link>(config: &DestinationConfig, link: L) -> Option<(Hello, Stream<L>)> {
    let heard = hear(link, config.stall);
    match heard {
        Ok((hello, mut stream)) if hello.purpose == Purpose::Resolve => {
            let is_gone = config.gone.contains(&hello.id);
            let status = if is_gone { PeerStatus::Gone } else { PeerStatus::Unknown };
            answer_other(&mut stream, status);
            None
        }
        Ok(heard) => Some(heard),
        Err(error) => {
            tracing::warn!(%error, "a connection that says no hello");
            None
        }
    }
}

/// Reads the first frame of a connection.
pub(super) fn hear<L: Link>(
    link: L,
    stall: std::time::Duration,
) -> Result<(Hello, Stream<L>), MigrationError> {
    let mut stream = Stream::new(link, stall)?;
    match stream.receive()? {
        Control::Hello(hello) => {
            stream.key(&hello, Side::Destination);
            Ok((hello, stream))
        }
        _ => Err(MigrationError::Peer { what: "a message before its hello" }),
    }
}
