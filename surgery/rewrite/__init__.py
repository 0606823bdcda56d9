"""Equal expressions that are cheaper or plainer: tables of rules, each row one identity of algebra."""
