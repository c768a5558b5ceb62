//! Connections over TCP, with TLS. The only module of this crate that opens sockets.

use std::collections::VecDeque;
use std::io::{self, Cursor, IoSlice, Read, Write};
use std::net::{IpAddr, Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
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
use crate::wire::frame::{HEADER_BYTES, Header};

/// Timeout for connecting to a peer, and for the TLS handshake and the hello.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);

/// Pause after a connection that the host cannot accept. It stays in the backlog.
const BACKOFF: Duration = Duration::from_millis(100);

/// Bytes of a hello's body. It has 40 today; later versions may have more.
const MAX_HELLO_BYTES: usize = 1024;

/// How a connection is secured.
#[derive(Clone, Debug)]
pub enum Security {
    /// TLS with certificates on both sides.
    Tls(Tls),
    /// No TLS: only between processes of one host, over a loopback address.
    PlainOnLoopback,
}

/// A connection, with or without TLS.
#[derive(Debug)]
pub struct TcpLink {
    end: End,
    /// The hello, if it was read in advance.
    read_ahead: Cursor<Vec<u8>>,
}

#[derive(Debug)]
enum End {
    /// Only on a loopback address.
    Plain(TcpStream),
    /// TLS; this side connected.
    Client(Box<StreamOwned<ClientConnection, TcpStream>>),
    /// TLS; this side accepted.
    Server(Box<StreamOwned<ServerConnection, TcpStream>>),
}

impl End {
    const fn socket(&self) -> &TcpStream {
        match self {
            Self::Plain(socket) => socket,
            Self::Client(tls) => &tls.sock,
            Self::Server(tls) => &tls.sock,
        }
    }

    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Plain(socket) => socket.read(buffer),
            Self::Client(tls) => tls.read(buffer),
            Self::Server(tls) => tls.read(buffer),
        }
    }
}

impl TcpLink {
    const fn new(end: End) -> Self {
        Self { end, read_ahead: Cursor::new(Vec::new()) }
    }

    /// Reads the peer's first frame in advance, so that no other thread has to wait for it.
    fn read_hello(&mut self, deadline: Instant) -> io::Result<()> {
        let no_hello = || io::Error::new(io::ErrorKind::InvalidData, "the peer sent no hello");
        let mut head = [0; HEADER_BYTES];
        self.fill(&mut head, deadline)?;
        let lengths = Header::read(head).map_err(|_| no_hello())?;
        if lengths.body_bytes > MAX_HELLO_BYTES || lengths.payload_bytes > 0 {
            return Err(no_hello());
        }
        let mut body = vec![0; lengths.body_bytes];
        self.fill(&mut body, deadline)?;
        self.read_ahead = Cursor::new([&head[..], &body].concat());
        Ok(())
    }

    fn fill(&mut self, mut buffer: &mut [u8], deadline: Instant) -> io::Result<()> {
        while !buffer.is_empty() {
            self.end.socket().set_timeout(left(deadline)?)?;
            match self.end.read(buffer) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(count) => buffer = buffer.get_mut(count..).unwrap_or_default(),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

/// Time until the deadline; `TimedOut` if it has passed.
fn left(deadline: Instant) -> io::Result<Duration> {
    let left = deadline.saturating_duration_since(Instant::now());
    if left.is_zero() { Err(io::ErrorKind::TimedOut.into()) } else { Ok(left) }
}

impl Read for TcpLink {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self.read_ahead.read(buffer)? {
            0 => self.end.read(buffer),
            count => Ok(count),
        }
    }
}

impl Write for TcpLink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match &mut self.end {
            End::Plain(socket) => socket.write(bytes),
            End::Client(tls) => tls.write(bytes),
            End::Server(tls) => tls.write(bytes),
        }
    }

    fn write_vectored(&mut self, parts: &[IoSlice<'_>]) -> io::Result<usize> {
        match &mut self.end {
            End::Plain(socket) => socket.write_vectored(parts),
            End::Client(tls) => tls.write_vectored(parts),
            End::Server(tls) => tls.write_vectored(parts),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match &mut self.end {
            End::Plain(socket) => socket.flush(),
            End::Client(tls) => tls.flush(),
            End::Server(tls) => tls.flush(),
        }
    }
}

impl Link for TcpLink {
    fn set_timeout(&self, time: Duration) -> io::Result<()> {
        self.end.socket().set_timeout(time)
    }

    fn closer(&self) -> io::Result<Closer> {
        self.end.socket().closer()
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
    /// For `HOST:PORT`, which is resolved once, now.
    ///
    /// # Errors
    /// The address is malformed or does not resolve, or a connection without TLS would leave this
    /// host.
    pub fn new(host_and_port: &str, security: Security) -> Result<Self, MigrationError> {
        let operator = |what: String| MigrationError::Operator { what };
        let (host, _) = host_and_port.rsplit_once(':').ok_or_else(|| {
            operator(format!("{host_and_port} is not HOST:PORT, such as host2:7000"))
        })?;
        let host = host.trim_start_matches('[').trim_end_matches(']').to_owned();
        let found = host_and_port.to_socket_addrs();
        let found =
            found.map_err(|error| operator(format!("cannot resolve {host_and_port}: {error}")))?;
        let addresses: Vec<_> = found.collect();
        let local = addresses.iter().all(|address| address.ip().is_loopback());
        if matches!(security, Security::PlainOnLoopback) && !local {
            let what = format!(
                "{host} is another host, and --plain is for this host only: give certificates (--tls-cert, --tls-key, --tls-ca)"
            );
            return Err(operator(what));
        }
        Ok(Self { host, addresses, security })
    }
}

impl TcpConnector {
    fn secured(&self, socket: TcpStream) -> io::Result<TcpLink> {
        match &self.security {
            Security::PlainOnLoopback => plain(socket),
            Security::Tls(tls) => {
                let client = tls.client(&self.host).map_err(io::Error::other)?;
                let agreed = handshake_tls(client, socket, Instant::now() + HANDSHAKE_TIMEOUT)?;
                Ok(TcpLink::new(End::Client(Box::new(agreed))))
            }
        }
    }
}

impl Connect for TcpConnector {
    type Link = TcpLink;

    fn connect(&mut self) -> io::Result<TcpLink> {
        let mut last = io::Error::from(io::ErrorKind::AddrNotAvailable);
        for address in &self.addresses {
            let at = |error: io::Error| io::Error::new(error.kind(), format!("{address}: {error}"));
            match TcpStream::connect_timeout(address, HANDSHAKE_TIMEOUT) {
                Ok(socket) => return self.secured(socket).map_err(at),
                Err(error) => last = at(error),
            }
        }
        Err(last)
    }
}

/// Accepts connections of sources. Each has its own thread until its hello has arrived, so that a
/// peer that connects and sends nothing, or half a message, blocks no other.
#[derive(Debug)]
pub struct TcpAcceptor {
    listener: TcpListener,
    security: Security,
    /// A peer must send a hello.
    requires_hello: bool,
    /// Connections in their handshake, oldest first.
    handshakes: VecDeque<Handshake>,
    newest: u64,
    results: Receiver<HandshakeResult>,
    result_sender: Sender<HandshakeResult>,
    /// Readable when a handshake has ended.
    wake_receiver: UnixStream,
    wake_sender: Arc<UnixStream>,
}

/// A connection in its handshake.
#[derive(Debug)]
struct Handshake {
    number: u64,
    host: IpAddr,
    socket: TcpStream,
}

/// The result of a handshake: its number, the peer, the connection.
type HandshakeResult = (u64, SocketAddr, io::Result<TcpLink>);

/// Handshakes at a time. An honest source completes its handshake within milliseconds. Beyond the
/// limit the oldest connection of the host that has most of them is closed, so a host that floods
/// this one blocks no other host.
const MAX_HANDSHAKES: usize = 4 * MAX_CONNECTIONS;

/// Stack of a handshake thread.
const STACK_BYTES: usize = 256 << 10;

impl TcpAcceptor {
    /// Listens on `address`.
    ///
    /// # Errors
    /// Listening fails, or sources of other hosts could connect without TLS.
    pub fn new(address: SocketAddr, security: Security) -> Result<Self, MigrationError> {
        if matches!(security, Security::PlainOnLoopback) && !address.ip().is_loopback() {
            let what = format!(
                "{address} can be reached by other hosts, and --plain is for this host only: give certificates (--tls-cert, --tls-key, --tls-ca), or listen on 127.0.0.1"
            );
            return Err(MigrationError::Operator { what });
        }
        let failed = MigrationError::link("listening");
        let listener = TcpListener::bind(address);
        let listener = listener.map_err(|source| MigrationError::Listen { address, source })?;
        listener.set_nonblocking(true).map_err(&failed)?;
        let (wake_receiver, wake_sender) = UnixStream::pair().map_err(&failed)?;
        wake_receiver.set_nonblocking(true).map_err(&failed)?;
        wake_sender.set_nonblocking(true).map_err(&failed)?;
        let ((result_sender, results), wake_sender) = (mpsc::channel(), Arc::new(wake_sender));
        let (handshakes, newest, requires_hello) = (VecDeque::new(), 0, true);
        Ok(Self {
            listener,
            security,
            requires_hello,
            handshakes,
            newest,
            results,
            result_sender,
            wake_receiver,
            wake_sender,
        })
    }

    /// Accepts connections without a hello too, once a peer has sent anything.
    #[must_use]
    pub fn without_hello(self) -> Self {
        Self { requires_hello: false, ..self }
    }

    /// The listening address.
    ///
    /// # Errors
    /// `getsockname` fails.
    pub fn address(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Starts the handshake of an accepted connection.
    fn start_handshake(&mut self, socket: TcpStream, from: SocketAddr) -> io::Result<()> {
        if self.handshakes.len() >= MAX_HANDSHAKES {
            self.close_excess();
        }
        self.newest += 1;
        let (number, closer) = (self.newest, socket.try_clone()?);
        let (security, requires_hello, result_sender) =
            (self.security.clone(), self.requires_hello, self.result_sender.clone());
        let wake_sender = Arc::clone(&self.wake_sender);
        let thread = thread::Builder::new().name("greet".to_owned()).stack_size(STACK_BYTES);
        thread.spawn(move || {
            // These fail if the acceptor is gone, or if it has not read the last wake-up yet.
            let result = diagnostics::contain(|| {
                diagnostics::panic_point("greet");
                handshake(&security, requires_hello, socket)
            });
            let result = result.unwrap_or_else(|panicked| Err(io::Error::other(panicked)));
            let _ = result_sender.send((number, from, result));
            let _ = (&*wake_sender).write(&[1]);
        })?;
        self.handshakes.push_back(Handshake { number, host: host(from.ip()), socket: closer });
        Ok(())
    }

    fn close_excess(&mut self) {
        let of_host = |host| self.handshakes.iter().filter(|other| other.host == host).count();
        let sizes: Vec<_> = self.handshakes.iter().map(|one| of_host(one.host)).collect();
        let most = sizes.iter().max();
        // Oldest first.
        let excess = sizes.iter().position(|size| Some(size) == most);
        if let Some(oldest) = excess.and_then(|at| self.handshakes.remove(at)) {
            // Its thread returns. Fails only if the socket is closed already.
            let _ = oldest.socket.shutdown(Shutdown::Both);
        }
    }

    /// The next connection whose handshake has succeeded.
    fn next(&mut self) -> Option<TcpLink> {
        while matches!((&self.wake_receiver).read(&mut [0; 64]), Ok(1..)) {}
        while let Ok((number, from, outcome)) = self.results.try_recv() {
            self.handshakes.retain(|one| one.number != number);
            match outcome {
                Ok(link) => return Some(link),
                Err(error) => tracing::warn!(%from, %error, "handshake failed"),
            }
        }
        None
    }
}

/// Completes the TLS handshake, and reads the hello.
fn handshake(security: &Security, requires_hello: bool, socket: TcpStream) -> io::Result<TcpLink> {
    let deadline = Instant::now() + HANDSHAKE_TIMEOUT;
    socket.set_nonblocking(false)?;
    let mut link = match security {
        Security::PlainOnLoopback => {
            socket.set_timeout(HANDSHAKE_TIMEOUT)?;
            socket.peek(&mut [0])?;
            plain(socket)?
        }
        Security::Tls(tls) => {
            let server = tls.server().map_err(io::Error::other)?;
            TcpLink::new(End::Server(Box::new(handshake_tls(server, socket, deadline)?)))
        }
    };
    if requires_hello {
        link.read_hello(deadline)?;
    }
    Ok(link)
}

/// The host of an address: an IPv6 host has all addresses of a /64 network.
fn host(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => {
            let [a, b, c, d, ..] = address.segments();
            Ipv6Addr::new(a, b, c, d, 0, 0, 0, 0).into()
        }
        address @ IpAddr::V4(_) => address,
    }
}

impl Accept for TcpAcceptor {
    type Link = TcpLink;

    fn accept(&mut self, deadline: Option<Instant>) -> io::Result<TcpLink> {
        loop {
            if let Some(link) = self.next() {
                return Ok(link);
            }
            wait(&self.listener, &self.wake_receiver, deadline)?;
            let (socket, from) = match self.listener.accept() {
                Ok(accepted) => accepted,
                Err(error) if is_peer_fault(&error) => continue,
                Err(error) if is_permanent(&error) => return Err(error),
                Err(error) => {
                    tracing::error!(%error, "host: cannot accept a connection; retrying");
                    thread::sleep(BACKOFF);
                    // A waiting connection makes the next poll return at once, so check the time
                    // here.
                    if deadline.is_some_and(|end| Instant::now() >= end) {
                        return Err(io::ErrorKind::TimedOut.into());
                    }
                    continue;
                }
            };
            if let Err(error) = self.start_handshake(socket, from) {
                tracing::warn!(%from, %error, "host: cannot start a handshake");
            }
        }
    }
}

/// An error that a peer can cause by closing its connection at once.
fn is_peer_fault(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionReset, Interrupted, WouldBlock};
    matches!(error.kind(), ConnectionAborted | ConnectionReset | Interrupted | WouldBlock)
}

/// The listener is unusable. Any other error is temporary: the host has no file descriptor or
/// memory left, or a network is down (`accept(2)`).
fn is_permanent(error: &io::Error) -> bool {
    use rustix::io::Errno;
    let errno = Errno::from_io_error(error);
    errno.is_none_or(|errno| [Errno::BADF, Errno::INVAL, Errno::NOTSOCK].contains(&errno))
}

/// Waits until a peer connects, or a handshake has ended.
fn wait(
    listener: &TcpListener,
    wake_receiver: &UnixStream,
    deadline: Option<Instant>,
) -> io::Result<()> {
    loop {
        let left = deadline.map(|end| end.saturating_duration_since(Instant::now()));
        let left = left.map(|left| Timespec {
            tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: left.subsec_nanos().into(),
        });
        let mut files =
            [PollFd::new(listener, PollFlags::IN), PollFd::new(wake_receiver, PollFlags::IN)];
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
        return Err(io::Error::other("a connection without TLS from another host"));
    }
    socket.set_nodelay(true)?;
    Ok(TcpLink::new(End::Plain(socket)))
}

/// Completes the TLS handshake by the deadline, even if the peer sends a byte now and then.
fn handshake_tls<C, S>(
    mut connection: C,
    mut socket: TcpStream,
    deadline: Instant,
) -> io::Result<StreamOwned<C, TcpStream>>
where
    C: DerefMut<Target = ConnectionCommon<S>>,
    S: SideData,
{
    socket.set_nodelay(true)?;
    while connection.is_handshaking() {
        socket.set_timeout(left(deadline)?)?;
        if connection.wants_write() {
            connection.write_tls(&mut socket)?;
            continue;
        }
        if connection.read_tls(&mut socket)? == 0 {
            let what =
                "the peer hung up during the TLS handshake: has it certificates, or --plain?";
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, what));
        }
        let processed = connection.process_new_packets();
        if let Err(error) = processed {
            // Send the TLS alert, which names the certificate error.
            let _ = connection.write_tls(&mut socket);
            let what = match &error {
                rustls::Error::InvalidMessage(_) => {
                    format!("the peer speaks no TLS ({error}): has it certificates, or --plain?")
                }
                _ => error.to_string(),
            };
            return Err(io::Error::new(io::ErrorKind::InvalidData, what));
        }
    }
    while connection.wants_write() {
        connection.write_tls(&mut socket)?;
    }
    Ok(StreamOwned::new(connection, socket))
}
