//! Whether an opaque connection may reach the app (AuthorizationPolicy on TCP), when it comes and as long as it is open.
//!
//! Who may not is reset before the app is connected: not a byte reaches it. That holds for servers that speak first too, which are not
//! connected to be heard while policies are against the connection.

use crate::authz::Policy;
use crate::conn::{Arrival, Direction};
use crate::telemetry::{Decision, Flag};
use crate::worker::Worker;
use crate::{http, log};
use std::rc::Rc;
use std::sync::Arc;
use weft_policy::authz::Verdict;

/// Whether an opaque connection may reach the app. Whoever has to be asked is, and what is decided is told.
pub(super) async fn admitted(arrival: &Arrival, worker: &Rc<Worker>) -> Result<(), Flag> {
    let policy = Arc::clone(&worker.config.load().policy);
    if policy.is_pending() {
        log::connection_error(&format_args!(
            "inbound {}: refused, the control plane has not said yet who may call; can it be reached?",
            arrival.down.peer
        ));
        return Err(Flag::NoConfiguration);
    }
    let decision = Decision { policy: &policy, arrival, outcome: None, refused_by_authorizer: None, token: None, http: None };
    let Some(mut outcome) = policy.judge(arrival) else {
        worker.recorder.decided(&decision);
        return Ok(());
    };
    while let Verdict::Ask(id) = outcome.verdict {
        let authorizer = policy.engine.policy(id).and_then(|policy| policy.authorizer.as_ref());
        let agrees = match authorizer {
            Some(authorizer) => Box::pin(http::ask_about(authorizer, arrival, worker, policy.identity())).await,
            None => false,
        };
        if !agrees {
            worker.recorder.decided(&Decision { refused_by_authorizer: Some(id), ..decision });
            return Err(Flag::UnauthorizedExternally);
        }
        outcome = policy.engine.resume(&Policy::connection(arrival), id);
    }
    worker.recorder.decided(&Decision { outcome: Some(&outcome), ..decision });
    match outcome.verdict {
        Verdict::Allow(_) => Ok(()),
        Verdict::Deny(_) | Verdict::Ask(_) => Err(Flag::Denied),
    }
}

/// Whether policies have something against the connection if it stays opaque, so that its server must not be connected to hear it out.
pub(super) fn is_doubtful(arrival: &Arrival, worker: &Worker) -> bool {
    let config = worker.config.load();
    arrival.down.direction == Direction::Inbound
        && (config.policy.is_pending()
            || config.policy.judge(arrival).is_some_and(|outcome| !matches!(outcome.verdict, Verdict::Allow(_))))
}

/// Resolves when an opaque connection, which can't be told to end, has to be closed: at once if policies are against it now; if it is no longer
/// taken because it is plaintext, when that has been so for as long as a drain may last.
pub(super) async fn unwelcome(worker: &Worker, arrival: &Arrival) -> Flag {
    let down = &arrival.down;
    if down.direction == Direction::Outbound {
        std::future::pending::<()>().await;
    }
    let mut watch = worker.drain.clone();
    let mut denied = worker.drain.clone();
    let taken = || worker.config.load().takes(down);
    // An authorizer has been asked when the connection came.
    let forbidden = || {
        let outcome = worker.config.load().policy.judge(arrival);
        outcome.is_some_and(|outcome| matches!(outcome.verdict, Verdict::Deny(_)))
    };
    let plaintext = async {
        loop {
            watch.when(|| !taken()).await;
            tokio::select! {
                () = tokio::time::sleep(worker.settings.timeouts.drain) => return,
                () = watch.when(taken) => {}
            }
        }
    };
    tokio::select! {
        () = plaintext => Flag::PlaintextRefused,
        () = denied.when(forbidden) => Flag::Denied,
    }
}
