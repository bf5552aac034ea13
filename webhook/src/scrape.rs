//! Merging the app's Prometheus metrics: a pod that asks to be scraped is scraped at the proxy's admin port, which returns the
//! app's metrics and its own.

use serde_json::{Map, Value};
use weft_api::names::ADMIN_PORT;
use weft_api::probe::AppMetrics;

/// Path of the merged scrape.
pub(crate) const MERGED_PATH: &str = "/stats/prometheus";

/// Annotations to set, and where the app's own metrics are.
#[derive(Debug, PartialEq)]
pub(crate) struct Merge {
    /// Key → new value.
    pub annotations: Vec<(String, String)>,
    /// For the proxy; absent: the app's port can't be told.
    pub app: Option<AppMetrics>,
    /// What could not be done.
    pub warning: Option<String>,
}

/// What to do for this pod; `None`: it doesn't ask to be scraped, or the merge is in place already.
pub(crate) fn merge(pod: &Value) -> Option<Merge> {
    let annotations = pod.pointer("/metadata/annotations")?.as_object()?;
    if find(annotations, "scrape")?.1 != "true" {
        return None;
    }
    let (port, path, scheme) = (find(annotations, "port"), find(annotations, "path"), find(annotations, "scheme"));
    let ours = ADMIN_PORT.to_string();
    if port.is_some_and(|(_, p)| p == ours) && path.is_some_and(|(_, p)| p == MERGED_PATH) {
        return None;
    }
    let mut warning = None;
    let number = match port {
        Some((key, text)) => {
            let number = text.parse::<u16>().ok().filter(|p| *p > 0);
            if number.is_none() {
                warning = Some(format!("annotation {key}: {text:?} is no port: the app's own metrics are not scraped"));
            }
            number
        }
        None => {
            let only = only_port(pod);
            if only.is_none() {
                warning = Some("prometheus.io/scrape is set without prometheus.io/port, and the app has not just one port: its own metrics are not scraped".into());
            }
            only
        }
    };
    let app = number.map(|port| AppMetrics {
        port,
        path: path.map_or_else(|| "/metrics".to_owned(), |(_, p)| p.to_owned()),
        scheme: scheme.map_or_else(|| "http".to_owned(), |(_, s)| s.to_ascii_lowercase()),
    });
    let key =
        |found: Option<(&str, &str)>, last: &str| found.map_or_else(|| format!("prometheus.io/{last}"), |(k, _)| k.to_owned());
    let mut set = vec![(key(port, "port"), ours), (key(path, "path"), MERGED_PATH.to_owned())];
    if let Some((key, _)) = scheme {
        set.push((key.to_owned(), "http".to_owned()));
    }
    Some(Merge { annotations: set, app, warning })
}

/// Prometheus sees annotation names with everything but letters and digits as `_`, so several spellings mean one.
fn find<'a>(annotations: &'a Map<String, Value>, last: &str) -> Option<(&'a str, &'a str)> {
    let exact = format!("prometheus.io/{last}");
    if let Some((key, value)) = annotations.get_key_value(&exact) {
        return Some((key, value.as_str()?));
    }
    let wanted = format!("prometheus_io_{last}");
    annotations.iter().find_map(|(key, value)| {
        let plain: String = key.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '_' }).collect();
        (plain == wanted).then_some((key.as_str(), value.as_str()?))
    })
}

fn only_port(pod: &Value) -> Option<u16> {
    let containers = pod.pointer("/spec/containers")?.as_array()?.iter();
    let mut ports =
        containers.filter_map(|c| c.get("ports")?.as_array()).flatten().filter_map(|p| p.get("containerPort")?.as_u64());
    let first = ports.next()?;
    ports.next().is_none().then(|| u16::try_from(first).ok())?
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn pod(annotations: Value, ports: Value) -> Value {
        json!({"metadata": {"annotations": annotations}, "spec": {"containers": [{"name": "a", "ports": ports}]}})
    }

    #[test]
    fn merges_where_asked() {
        let merged = merge(&pod(
            json!({"prometheus.io/scrape": "true", "prometheus.io/port": "9100", "prometheus.io/scheme": "https"}),
            json!([]),
        ))
        .unwrap();
        assert_eq!(merged.app, Some(AppMetrics { port: 9100, path: "/metrics".into(), scheme: "https".into() }));
        assert_eq!(
            merged.annotations,
            [
                ("prometheus.io/port".into(), "15020".into()),
                ("prometheus.io/path".into(), "/stats/prometheus".into()),
                ("prometheus.io/scheme".to_owned(), "http".to_owned()),
            ]
        );
        let other =
            merge(&pod(json!({"prometheus_io/scrape": "true", "prometheus.io-path": "/m"}), json!([{"containerPort": 8080}])))
                .unwrap();
        assert_eq!(other.app, Some(AppMetrics { port: 8080, path: "/m".into(), scheme: "http".into() }));
        assert_eq!(other.annotations[1].0, "prometheus.io-path");
    }

    #[test]
    fn leaves_alone_what_did_not_ask_or_is_merged() {
        for annotations in [
            json!({}),
            json!({"prometheus.io/scrape": "false"}),
            json!({"prometheus.io/scrape": "true", "prometheus.io/port": "15020", "prometheus.io/path": "/stats/prometheus"}),
        ] {
            assert_eq!(merge(&pod(annotations, json!([]))), None);
        }
    }

    #[test]
    fn a_port_that_cannot_be_told_is_said() {
        let merged =
            merge(&pod(json!({"prometheus.io/scrape": "true"}), json!([{"containerPort": 1}, {"containerPort": 2}]))).unwrap();
        assert!(merged.app.is_none() && merged.warning.is_some());
        let merged = merge(&pod(json!({"prometheus.io/scrape": "true", "prometheus.io/port": "web"}), json!([]))).unwrap();
        assert!(merged.warning.unwrap().contains("web"));
    }
}
