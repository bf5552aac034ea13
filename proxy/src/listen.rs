//! Accepting: a loop per listening socket. When descriptors or memory run out it pauses and tries again, with a growing
//! delay: the connections that are there go on, and the kernel's queue keeps the new ones.

use crate::connection::{self, Context};
use crate::settings::Listener;
use std::io;
use std::rc::Rc;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::sync::watch;

const FIRST_PAUSE: Duration = Duration::from_millis(5);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// Takes connections until `stop` says so.
pub async fn accept(socket: TcpListener, listener: Rc<Listener>, context: Rc<Context>, mut stop: watch::Receiver<bool>) {
    let mut pause = FIRST_PAUSE;
    loop {
        let accepted = tokio::select! {
            accepted = socket.accept() => accepted,
            _ = stop.wait_for(|stop| *stop) => return,
        };
        match accepted {
            Ok((stream, peer)) => {
                pause = FIRST_PAUSE;
                tokio::task::spawn_local(connection::serve(stream, peer, Rc::clone(&listener), Rc::clone(&context)));
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
