//! Connections that fail in a chosen way at a chosen write.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use migration::link::{Closer, Link};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Cut before the write.
    Cut,
    /// Cut after the write.
    CutAfter,
    /// Half of it is written, then the connection is cut.
    Truncate,
    /// It and every later write are discarded.
    Stall,
    /// One bit is flipped.
    Corrupt,
    /// It is discarded, later ones are written.
    Lose,
    /// It is written twice.
    Repeat,
    /// It is written after the next one.
    Reorder,
}

/// Which write of one side, over all its connections, fails and how.
#[derive(Debug)]
pub struct Plan {
    pub kind: Kind,
    pub at: usize,
    pub writes: AtomicUsize,
}

impl Plan {
    pub fn new(kind: Kind, at: usize) -> Arc<Self> {
        Arc::new(Self { kind, at, writes: AtomicUsize::new(0) })
    }

    pub fn never() -> Arc<Self> {
        Self::new(Kind::Cut, usize::MAX)
    }
}

pub struct Faulty {
    inner: UnixStream,
    plan: Arc<Plan>,
    stalled: bool,
    held: Option<Vec<u8>>,
}

impl Faulty {
    pub fn new(inner: UnixStream, plan: &Arc<Plan>) -> Self {
        Self { inner, plan: Arc::clone(plan), stalled: false, held: None }
    }

    fn cut(&self) -> io::Result<usize> {
        let _ = self.inner.shutdown(Shutdown::Both);
        Err(io::ErrorKind::BrokenPipe.into())
    }
}

impl Read for Faulty {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.inner.read(buffer)
    }
}

impl Write for Faulty {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let number = self.plan.writes.fetch_add(1, Ordering::SeqCst);
        if self.stalled {
            return Ok(bytes.len());
        }
        if number != self.plan.at {
            self.inner.write_all(bytes)?;
            if let Some(held) = self.held.take() {
                self.inner.write_all(&held)?;
            }
            return Ok(bytes.len());
        }
        match self.plan.kind {
            Kind::Cut => return self.cut(),
            Kind::CutAfter => {
                self.inner.write_all(bytes)?;
                let _ = self.inner.shutdown(Shutdown::Both);
            }
            Kind::Truncate => {
                self.inner.write_all(&bytes[..bytes.len() / 2])?;
                return self.cut();
            }
            Kind::Stall => self.stalled = true,
            Kind::Corrupt => {
                let mut changed = bytes.to_vec();
                let at = number * 7919 % changed.len();
                changed[at] ^= 1 << (number % 8);
                self.inner.write_all(&changed)?;
            }
            Kind::Lose => {}
            Kind::Repeat => {
                self.inner.write_all(bytes)?;
                self.inner.write_all(bytes)?;
            }
            Kind::Reorder => self.held = Some(bytes.to_vec()),
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Link for Faulty {
    fn set_timeout(&self, time: Duration) -> io::Result<()> {
        self.inner.set_timeout(time)
    }

    fn closer(&self) -> io::Result<Closer> {
        self.inner.closer()
    }
}
