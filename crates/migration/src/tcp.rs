//! Connections over TCP, with TLS. The only place here that knows sockets.

use std::collections::VecDeque;
use std::io::{self, IoSlice, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::ops::DerefMut;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustls::{ClientConnection, ConnectionCommon, ServerConnection, SideData, StreamOwned};

use crate::error::MigrationError;
use crate::limits::MAX_CONNECTIONS;
use crate::link::{Accept, Closer, Connect, Link};
use crate::tls::Tls;

/// How long a peer may take to be reached, and to agree on keys.
const HANDSHAKE: Duration = Duration::from_secs(10);

/// How a connection is secured.
#[derive(Clone, Debug)]
pub enum Security {
    /// By certificates on both sides.
    Tls(Tls),
    /// Not at all: only between processes of one host, over a loopback address.
    PlainOnLoopback,
}

/// One connection.
#[derive(Debug)]
pub enum TcpLink {
    /// Only on a loopback address.
    Plain(TcpStream),
    /// Encrypted, with both sides known; this one connected.
    Client(Box<StreamOwned<ClientConnection, TcpStream>>),
    /// Encrypted, with both sides known; this one was connected to.
    Server(Box<StreamOwned<ServerConnection, TcpStream>>),
}

impl TcpLink {
    const fn socket(&self) -> &TcpStream {
        match self {
            Self::Plain(socket) => socket,
            Self::Client(tls) => &tls.sock,
            Self::Server(tls) => &tls.sock,
        }
    }
}

impl Read for TcpLink {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Plain(socket) => socket.read(buffer),
            Self::Client(tls) => tls.read(buffer),
            Self::Server(tls) => tls.read(buffer),
        }
    }
}

impl Write for TcpLink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Plain(socket) => socket.write(bytes),
            Self::Client(tls) => tls.write(bytes),
            Self::Server(tls) => tls.write(bytes),
        }
    }

    fn write_vectored(&mut self, parts: &[IoSlice<'_>]) -> io::Result<usize> {
        match self {
            Self::Plain(socket) => socket.write_vectored(parts),
            Self::Client(tls) => tls.write_vectored(parts),
            Self::Server(tls) => tls.write_vectored(parts),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match self {
            Self::Plain(socket) => socket.flush(),
            Self::Client(tls) => tls.flush(),
            Self::Server(tls) => tls.flush(),
        }
    }
}

impl Link for TcpLink {
    fn set_timeout(&self, time: Duration) -> io::Result<()> {
        self.socket().set_timeout(time)
    }

    fn closer(&self) -> io::Result<Closer> {
        self.socket().closer()
    }
}

/// Connects to a destination.
#[derive(Clone, Debug)]
pub struct TcpConnector {
    host: String,
    addresses: Vec<SocketAddr>,
    security: Security,
}

impl TcpConnector {
    /// For `HOST:PORT`, which is looked up now and once.
    ///
    /// # Errors
    /// It is no such thing, or not found; or a connection without TLS would leave this host.
    pub fn new(host_and_port: &str, security: Security) -> Result<Self, MigrationError> {
        let operator = |what: String| MigrationError::Operator { what };
        let (host, _) = host_and_port
            .rsplit_once(':')
            .ok_or_else(|| operator(format!("{host_and_port} is not HOST:PORT")))?;
        let host = host.trim_start_matches('[').trim_end_matches(']').to_owned();
        let found = host_and_port.to_socket_addrs();
        let found = found.map_err(|error| operator(format!("{host_and_port}: {error}")))?;
        let addresses: Vec<_> = found.collect();
        let local = addresses.iter().all(|address| address.ip().is_loopback());
        if matches!(security, Security::PlainOnLoopback) && !local {
            let what = format!("{host} is another host, which needs TLS");
            return Err(operator(what));
        }
        Ok(Self { host, addresses, security })
    }
}

impl Connect for TcpConnector {
    type Link = TcpLink;

    fn connect(&mut self) -> io::Result<TcpLink> {
        let mut last = io::Error::from(io::ErrorKind::AddrNotAvailable);
        for address in &self.addresses {
            match TcpStream::connect_timeout(address, HANDSHAKE) {
                Ok(socket) => {
                    return match &self.security {
                        Security::PlainOnLoopback => plain(socket),
                        Security::Tls(tls) => {
                            let client = tls.client(&self.host).map_err(io::Error::other)?;
                            let agreed = agree(client, socket)?;
                            Ok(TcpLink::Client(Box::new(agreed)))
                        }
                    };
                }
                Err(error) => last = error,
            }
        }
        Err(last)
    }
}

/// Takes connections of sources. Each is greeted by a thread of its own, so that a stranger who
/// connects and says nothing keeps nobody waiting.
#[derive(Debug)]
pub struct TcpAcceptor {
    listener: TcpListener,
    security: Security,
    /// Those that are being greeted, oldest first.
    greeting: VecDeque<(u64, TcpStream)>,
    newest: u64,
    greeted: Receiver<Greeted>,
    greets: Sender<Greeted>,
    /// Readable when somebody was greeted.
    bell: UnixStream,
    rings: Arc<UnixStream>,
}

/// What came of greeting one.
type Greeted = (u64, SocketAddr, io::Result<TcpLink>);

/// Connections that are greeted at a time. An honest source has said its part within milliseconds,
/// so where there are more the oldest one goes.
const MAX_GREETINGS: usize = 4 * MAX_CONNECTIONS;

/// Stack of a thread that greets.
const STACK_BYTES: usize = 256 << 10;

impl TcpAcceptor {
    /// Listens on `address`.
    ///
    /// # Errors
    /// It cannot be listened on; or sources of other hosts could come without TLS.
    pub fn new(address: SocketAddr, security: Security) -> Result<Self, MigrationError> {
        if matches!(security, Security::PlainOnLoopback) && !address.ip().is_loopback() {
            let what = format!("{address} can be reached by other hosts, which needs TLS");
            return Err(MigrationError::Operator { what });
        }
        let failed = MigrationError::link("listening");
        let listener = TcpListener::bind(address).map_err(&failed)?;
        listener.set_nonblocking(true).map_err(&failed)?;
        let (bell, rings) = UnixStream::pair().map_err(&failed)?;
        bell.set_nonblocking(true).map_err(&failed)?;
        rings.set_nonblocking(true).map_err(&failed)?;
        let ((greets, greeted), rings) = (mpsc::channel(), Arc::new(rings));
        let (greeting, newest) = (VecDeque::new(), 0);
        Ok(Self { listener, security, greeting, newest, greeted, greets, bell, rings })
    }

    /// Where it listens.
    ///
    /// # Errors
    /// The system does not say.
    pub fn address(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Begins to greet one who came.
    fn greet(&mut self, socket: TcpStream, from: SocketAddr) -> io::Result<()> {
        if self.greeting.len() >= MAX_GREETINGS
            && let Some((_, oldest)) = self.greeting.pop_front()
        {
            // Its thread comes back. One that is closed already is closed.
            let _ = oldest.shutdown(Shutdown::Both);
        }
        self.newest += 1;
        let (number, closes) = (self.newest, socket.try_clone()?);
        let (security, greets) = (self.security.clone(), self.greets.clone());
        let rings = Arc::clone(&self.rings);
        let thread = thread::Builder::new().name("greet".to_owned()).stack_size(STACK_BYTES);
        thread.spawn(move || {
            // Nobody listens any more where these fail, or has not heard the last ring yet.
            let greeted = diagnostics::contain(|| {
                diagnostics::panic_point("greet");
                greet(&security, socket)
            });
            let greeted = greeted.unwrap_or_else(|panicked| Err(io::Error::other(panicked)));
            let _ = greets.send((number, from, greeted));
            let _ = (&*rings).write(&[1]);
        })?;
        self.greeting.push_back((number, closes));
        Ok(())
    }

    /// The next one that was greeted.
    fn next(&mut self) -> Option<TcpLink> {
        while matches!((&self.bell).read(&mut [0; 64]), Ok(1..)) {}
        while let Ok((number, from, outcome)) = self.greeted.try_recv() {
            self.greeting.retain(|(greeting, _)| *greeting != number);
            match outcome {
                Ok(link) => return Some(link),
                Err(error) => tracing::warn!(%from, %error, "sent away"),
            }
        }
        None
    }
}

/// Agrees on keys, or at least waits until there is something to be heard.
fn greet(security: &Security, socket: TcpStream) -> io::Result<TcpLink> {
    socket.set_nonblocking(false)?;
    match security {
        Security::PlainOnLoopback => {
            socket.set_timeout(HANDSHAKE)?;
            socket.peek(&mut [0])?;
            plain(socket)
        }
        Security::Tls(tls) => {
            let server = tls.server().map_err(io::Error::other)?;
            Ok(TcpLink::Server(Box::new(agree(server, socket)?)))
        }
    }
}

impl Accept for TcpAcceptor {
    type Link = TcpLink;

    fn accept(&mut self, deadline: Option<Instant>) -> io::Result<TcpLink> {
        loop {
            if let Some(link) = self.next() {
                return Ok(link);
            }
            wait(&self.listener, &self.bell, deadline)?;
            let (socket, from) = match self.listener.accept() {
                Ok(accepted) => accepted,
                Err(error) if is_of_the_peer(&error) => continue,
                Err(error) => return Err(error),
            };
            if let Err(error) = self.greet(socket, from) {
                tracing::warn!(%from, %error, "cannot be greeted");
            }
        }
    }
}

/// What a peer can bring about by hanging up at once.
fn is_of_the_peer(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionReset, Interrupted, WouldBlock};
    matches!(error.kind(), ConnectionAborted | ConnectionReset | Interrupted | WouldBlock)
}

/// Waits until somebody connects, or was greeted.
fn wait(listener: &TcpListener, bell: &UnixStream, deadline: Option<Instant>) -> io::Result<()> {
    loop {
        let left = deadline.map(|end| end.saturating_duration_since(Instant::now()));
        let left = left.map(|left| Timespec {
            tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: left.subsec_nanos().into(),
        });
        let mut files = [PollFd::new(listener, PollFlags::IN), PollFd::new(bell, PollFlags::IN)];
        match poll(&mut files, left.as_ref()) {
            Ok(0) => return Err(io::ErrorKind::TimedOut.into()),
            Ok(_) => return Ok(()),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

fn plain(socket: TcpStream) -> io::Result<TcpLink> {
    let local = socket.peer_addr()?.ip().is_loopback() && socket.local_addr()?.ip().is_loopback();
    if !local {
        return Err(io::Error::other("without TLS, from another host"));
    }
    socket.set_nodelay(true)?;
    Ok(TcpLink::Plain(socket))
}

/// Agrees on keys. A peer that sends a byte now and then does not hold us for ever.
fn agree<C, S>(mut connection: C, mut socket: TcpStream) -> io::Result<StreamOwned<C, TcpStream>>
where
    C: DerefMut<Target = ConnectionCommon<S>>,
    S: SideData,
{
    let deadline = Instant::now() + HANDSHAKE;
    socket.set_nodelay(true)?;
    socket.set_timeout(HANDSHAKE)?;
    while connection.is_handshaking() {
        if Instant::now() > deadline {
            return Err(io::ErrorKind::TimedOut.into());
        }
        if connection.wants_write() {
            connection.write_tls(&mut socket)?;
            continue;
        }
        if connection.read_tls(&mut socket)? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let processed = connection.process_new_packets();
        if let Err(error) = processed {
            // The peer is told which of its certificates is not believed.
            let _ = connection.write_tls(&mut socket);
            return Err(io::Error::new(io::ErrorKind::InvalidData, error));
        }
    }
    while connection.wants_write() {
        connection.write_tls(&mut socket)?;
    }
    Ok(StreamOwned::new(connection, socket))
}
