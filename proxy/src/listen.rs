//! Accepting: a loop per listening socket. When descriptors or memory run out it pauses and tries again, with a growing
//! delay: the connections that are there go on, and the kernel's queue keeps the new ones.

use crate::connection::{self, Context};
use crate::settings::Listener;
use crate::sys;
use std::io;
use std::rc::Rc;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::sync::watch;

const FIRST_PAUSE: Duration = Duration::from_millis(5);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);
/// Descriptors that are left over: listening sockets, the runtime's own, pipes, the admin port.
const RESERVE: u64 = 24;

/// A client that is served, counted as long as it is.
struct Admitted(Rc<Context>);

impl Admitted {
    fn new(context: &Rc<Context>) -> Self {
        context.clients.set(context.clients.get() + 1);
        Self(Rc::clone(context))
    }
}

impl Drop for Admitted {
    fn drop(&mut self) {
        self.0.clients.set(self.0.clients.get() - 1);
    }
}

/// Takes connections until `stop` says so.
pub async fn accept(socket: TcpListener, listener: Rc<Listener>, context: Rc<Context>, mut stop: watch::Receiver<bool>) {
    let mut pause = FIRST_PAUSE;
    // Each client may need a destination too: one that is taken in and then can't be served is worse off than in the queue.
    let workers = context.worker.settings.workers.max(1) as u64;
    let limit = (sys::descriptor_limit().saturating_sub(RESERVE) / 2 / workers).max(1);
    loop {
        let accepted = tokio::select! {
            accepted = socket.accept() => accepted,
            _ = stop.wait_for(|stop| *stop) => return,
        };
        match accepted {
            Ok((stream, peer)) => {
                pause = FIRST_PAUSE;
                let admitted = Admitted::new(&context);
                let (of, with) = (Rc::clone(&listener), Rc::clone(&context));
                // Called inside: a future that is captured and then awaited has its memory twice.
                tokio::task::spawn_local(async move {
                    let _admitted = admitted;
                    connection::serve(stream, peer, of, with).await;
                });
                let crowded = context.clients.get() >= limit;
                if crowded {
                    crate::log::connection_error(&format_args!(
                        "accepting on {} pauses: descriptors run out with {limit} clients; raise the limit on open files",
                        listener.address
                    ));
                    while context.clients.get() >= limit && !*stop.borrow() {
                        tokio::time::sleep(FIRST_PAUSE).await;
                    }
                }
            }
            // The client has gone between the handshake and now.
            Err(error) if is_the_client_s(&error) => {}
            Err(error) => {
                crate::log::connection_error(&format_args!("accepting on {} pauses for {pause:?}: {error}", listener.address));
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(LONGEST_PAUSE);
            }
        }
    }
}

fn is_the_client_s(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::ConnectionAborted | io::ErrorKind::ConnectionReset | io::ErrorKind::ConnectionRefused)
}
