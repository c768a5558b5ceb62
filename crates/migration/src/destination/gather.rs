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

/// Waits for a source with all of its connections. Whoever comes and does not belong to it, or
/// speaks something else, is sent away; a source that does not come with all that it announced is
/// forgotten.
pub(super) fn gather<A: Accept>(
    config: &DestinationConfig,
    accept: &mut A,
) -> Result<Group<A::Link>, MigrationError> {
    let waiting = MigrationError::link("waiting for a source");
    loop {
        let link = accept.accept(config.deadline).map_err(&waiting)?;
        let Some((hello, stream)) = greet(config, link) else { continue };
        let deadline = Instant::now() + config.stall;
        let deadline = config.deadline.map_or(deadline, |end| end.min(deadline));
        let mut streams = BTreeMap::from([(hello.index, stream)]);
        while streams.len() < usize::from(hello.count) {
            match accept.accept(Some(deadline)) {
                Ok(link) => {
                    let Some((other, stream)) = greet(config, link) else { continue };
                    if other.id == hello.id && other.count == hello.count {
                        streams.insert(other.index, stream);
                    }
                }
                Err(error) if is_time_out(&error) => break,
                Err(error) => return Err(waiting(error)),
            }
        }
        if streams.len() == usize::from(hello.count) {
            let streams = streams.into_values().collect();
            return Ok(Group { id: hello.id, hello, streams });
        }
        tracing::warn!(id = %hello.id, "a source did not open all of its connections");
    }
}

fn is_time_out(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock)
}

/// Hears one connection's hello.
fn greet<L: Link>(config: &DestinationConfig, link: L) -> Option<(Hello, Stream<L>)> {
    let heard = hear(link, config.stall);
    match heard {
        Ok((hello, mut stream)) if hello.purpose == Purpose::Settle => {
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
