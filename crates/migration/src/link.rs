//! What a connection must be able to do. The migration itself opens none.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

/// Ends a connection from another thread, so that whoever reads or writes it comes back.
pub type Closer = Box<dyn Fn() + Send + Sync>;

/// A stream of bytes in both directions. It is used in one direction at a time.
pub trait Link: Read + Write + Send {
    /// Has reads and writes fail with `WouldBlock` or `TimedOut` when nothing moves for `time`.
    ///
    /// # Errors
    /// The system refuses.
    fn set_timeout(&self, time: Duration) -> io::Result<()>;

    /// What ends this connection.
    ///
    /// # Errors
    /// The system refuses.
    fn closer(&self) -> io::Result<Closer>;
}

/// Opens connections to a destination.
pub trait Connect {
    /// What it opens.
    type Link: Link;

    /// Opens one more.
    ///
    /// # Errors
    /// The peer is not there, or refuses.
    fn connect(&mut self) -> io::Result<Self::Link>;
}

/// Takes connections of a source.
pub trait Accept {
    /// What it takes.
    type Link: Link;

    /// Waits for one more, until `deadline` if there is one.
    ///
    /// # Errors
    /// `TimedOut`, or the system refuses. A peer that comes and fails is no error but is passed over.
    fn accept(&mut self, deadline: Option<Instant>) -> io::Result<Self::Link>;
}

impl<L: Link, F: FnMut() -> io::Result<L>> Connect for F {
    type Link = L;

    fn connect(&mut self) -> io::Result<L> {
        self()
    }
}

/// Both kinds of sockets can do it by the same words, and share no trait that has them.
macro_rules! socket_is_link {
    ($socket:ty) => {
        impl Link for $socket {
            fn set_timeout(&self, time: Duration) -> io::Result<()> {
                self.set_read_timeout(Some(time))?;
                self.set_write_timeout(Some(time))
            }

            fn closer(&self) -> io::Result<Closer> {
                let other = self.try_clone()?;
                // One that is closed already is closed.
                Ok(Box::new(move || drop(other.shutdown(Shutdown::Both))))
            }
        }
    };
}

socket_is_link!(TcpStream);
socket_is_link!(UnixStream);
