-- The server itself refuses to run a script with flags on a read-only replica, unless they contain `no-writes`.
local function replica() end
