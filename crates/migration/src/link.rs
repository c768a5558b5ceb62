//! The interface of a connection. The migration itself opens none.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

/// Closes a connection from another thread, so that blocked reads and writes return.
pub type Closer = Box<dyn Fn() + Send + Sync>;

/// A stream of bytes in both directions. It is used in one direction at a time.
pub trait Link: Read + Write + Send {
    /// Makes reads and writes fail with `WouldBlock` or `TimedOut` when no byte moves for `time`.
    ///
    /// # Errors
    /// The system refuses.
    fn set_timeout(&self, time: Duration) -> io::Result<()>;

    /// Returns a closure that closes this connection.
    ///
    /// # Errors
    /// The system refuses.
    fn closer(&self) -> io::Result<Closer>;
}

/// Opens connections to a destination.
pub trait Connect {
    /// The connection's type.
    type Link: Link;

    /// Opens another connection.
    ///
    /// # Errors
    /// The peer is unreachable, or refuses.
    fn connect(&mut self) -> io::Result<Self::Link>;
}

/// Accepts connections of a source.
pub trait Accept {
    /// The connection's type.
    type Link: Link;

    /// Waits for another connection, until `deadline` if there is one.
    ///
    /// # Errors
    /// `TimedOut`, or the system refuses. A peer that connects and fails is skipped without an
    /// error.
    fn accept(&mut self, deadline: Option<Instant>) -> io::Result<Self::Link>;
}

impl<L: Link, F: FnMut() -> io::Result<L>> Connect for F {
    type Link = L;

    fn connect(&mut self) -> io::Result<L> {
        self()
    }
}

/// Both kinds of sockets have these methods, but no common trait.
macro_rules! socket_is_link {
    ($socket:ty) => {
        impl Link for $socket {
            fn set_timeout(&self, time: Duration) -> io::Result<()> {
                self.set_read_timeout(Some(time))?;
                self.set_write_timeout(Some(time))
            }

            fn closer(&self) -> io::Result<Closer> {
                let other = self.try_clone()?;
                // Fails only if it is closed already.
                Ok(Box::new(move || drop(other.shutdown(Shutdown::Both))))
            }
        }
    };
}

socket_is_link!(TcpStream);
socket_is_link!(UnixStream);
