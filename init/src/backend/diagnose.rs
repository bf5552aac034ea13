//! From a tool's complaint to the kernel module that is missing, and what to do about it. An init container has neither
//! /lib/modules nor the right to load anything, so the advice is for the node.

use crate::flags::Backend;
use crate::rules::Family;

/// What a complaint means and what to do, if it is one that we know. `script` is what the tool was fed.
pub(super) fn advice(backend: Backend, family: Family, message: &str, script: &str) -> Option<String> {
    let lower = message.to_lowercase();
    if lower.contains("operation not permitted") || lower.contains("permission denied") {
        let needed = if backend == Backend::Legacy { "NET_ADMIN and NET_RAW" } else { "NET_ADMIN" };
        return Some(format!(
            "The container weft-init needs the capability {needed} and runAsUser: 0; a seccomp or SELinux policy may also \
             forbid it"
        ));
    }
    if lower.contains("holding the xtables lock") || lower.contains("resource temporarily unavailable") {
        return Some("Another program was changing the rules of this pod; the next start of the container tries again".into());
    }
    let modules = missing_modules(backend, family, &lower, script)?;
    Some(format!(
        "The node's kernel lacks {}: run `modprobe {}` on the node (and list it in /etc/modules-load.d), or choose another \
         --backend (annotation weft.mesh/init-backend)",
        if modules.contains(' ') { "one of these modules" } else { "a module" },
        modules
    ))
}

fn missing_modules(backend: Backend, family: Family, lower: &str, script: &str) -> Option<String> {
    let six = if family == Family::V6 { "6" } else { "" };
    if let Some(table) = ["nat", "mangle", "raw"]
        .into_iter()
        .find(|table| lower.contains(&format!("table `{table}'")) || lower.contains(&format!("table '{table}'")))
    {
        if backend == Backend::Legacy {
            return Some(format!("ip{six}table_{table}"));
        }
        return Some(if table == "nat" { "nf_tables nft_chain_nat".into() } else { "nf_tables".into() });
    }
    if lower.contains("failed to initialize nft") || lower.contains("unable to initialize netlink") {
        return Some("nf_tables".into());
    }
    // "Extension owner revision 0 not supported, missing kernel module?"
    for (before, prefix) in [("extension ", "xt_"), ("couldn't load match `", "xt_"), ("couldn't load target `", "xt_")] {
        if let Some(name) = lower.split_once(before).map(|(_, rest)| rest) {
            let name: String = name.chars().take_while(|each| each.is_ascii_alphanumeric() || *each == '_').collect();
            if !name.is_empty() {
                // Matches have lower-case modules, targets upper-case ones.
                let target = ["redirect", "tproxy", "ct", "mark", "connmark"].contains(&name.as_str())
                    && script.contains(&format!("-j {}", name.to_uppercase()));
                return Some(format!("{prefix}{}", if target { name.to_uppercase() } else { name }));
            }
        }
    }
    let absent = ["no such file or directory", "no chain/target/match by that name", "protocol not supported", "not supported"];
    if !absent.iter().any(|phrase| lower.contains(phrase)) {
        return None;
    }
    let mut modules: Vec<&str> = match backend {
        Backend::Nft => vec!["nf_tables", "nft_compat", "nft_chain_nat"],
        Backend::Nftables => vec!["nf_tables", "nft_chain_nat", "nft_redir", "nft_ct"],
        Backend::Legacy => vec!["ip_tables"],
    };
    let extensions: &[(&str, &str)] = if backend == Backend::Nftables {
        &[("tproxy to", "nft_tproxy")]
    } else {
        &[
            ("-j REDIRECT", "xt_REDIRECT"),
            ("-m owner", "xt_owner"),
            ("-m multiport", "xt_multiport"),
            ("-m conntrack", "xt_conntrack"),
            ("-m connmark", "xt_connmark"),
            ("-j TPROXY", "xt_TPROXY"),
            ("-j CT", "xt_CT"),
            ("-j MARK", "xt_mark"),
        ]
    };
    modules.extend(extensions.iter().filter(|(word, _)| script.contains(word)).map(|(_, module)| *module));
    Some(modules.join(" "))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn named(backend: Backend, family: Family, message: &str, script: &str) -> String {
        advice(backend, family, message, script).unwrap_or_default()
    }

    #[test]
    fn the_missing_module_is_named() {
        let legacy = "iptables-restore v1.8.9 (legacy): iptables-restore: unable to initialize table 'nat'";
        assert!(named(Backend::Legacy, Family::V4, legacy, "").contains("modprobe iptable_nat`"));
        assert!(
            named(Backend::Legacy, Family::V6, &legacy.replace("iptables", "ip6tables"), "").contains("modprobe ip6table_nat`")
        );
        let insmod = "can't initialize iptables table `mangle': Table does not exist (do you need to insmod?)";
        assert!(named(Backend::Legacy, Family::V4, insmod, "").contains("modprobe iptable_mangle`"));
        let owner = "Warning: Extension owner revision 0 not supported, missing kernel module?";
        assert!(named(Backend::Nft, Family::V4, owner, "-m owner --uid-owner 1 -j RETURN").contains("modprobe xt_owner`"));
        let redirect = "Warning: Extension REDIRECT revision 0 not supported, missing kernel module?";
        assert!(named(Backend::Nft, Family::V4, redirect, "-j REDIRECT --to-ports 1").contains("modprobe xt_REDIRECT`"));
        let rule = "line 12: RULE_APPEND failed (No such file or directory): rule in chain WEFT_OUTPUT";
        let several = named(Backend::Nft, Family::V4, rule, "-m owner --uid-owner 1337 -j REDIRECT");
        assert!(several.contains("nft_compat") && several.contains("xt_owner") && !several.contains("xt_TPROXY"), "{several}");
        let nft = "iptables-nft-restore: Failed to initialize nft: Protocol not supported";
        assert!(named(Backend::Nft, Family::V4, nft, "").contains("modprobe nf_tables`"));
    }

    #[test]
    fn missing_rights_are_no_missing_module() {
        let message = "Fetching rule set generation id failed: Operation not permitted (you must be root)";
        let advice = named(Backend::Nft, Family::V4, message, "");
        assert!(advice.contains("NET_ADMIN") && !advice.contains("modprobe") && !advice.contains("NET_RAW"), "{advice}");
        assert!(named(Backend::Legacy, Family::V4, message, "").contains("NET_RAW"));
    }

    #[test]
    fn an_unknown_complaint_gets_no_invented_advice() {
        assert_eq!(advice(Backend::Nft, Family::V4, "line 3 failed", ""), None);
    }
}
